"""The command ``stochbn`` (also ``python -m stochbn``)."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from stochbn import cli
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("stochbn"):
            raise
        sys.exit(f"the stochbn command needs {error.name}, which is not installed: pip install 'stochbn[paper]'")
    cli.main()


if __name__ == "__main__":
    main()
