"""The command ``stochbn`` (also ``python -m stochbn``)."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from stochbn import cli

        cli.main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "stochbn":
            raise
        sys.exit(f"the stochbn command needs {error.name}, which is not installed: pip install 'stochbn[cli]'")
    except KeyboardInterrupt:  # before the command line, which has its own way to stop, was there
        sys.exit(130)


if __name__ == "__main__":
    main()
