"""Predictions with uncertainty by FastAPI: one predictive serves the threads of a pool.

export STOCHBN_SCORER='{"model": "mynet:build", "weights": "w.pt", "posterior": "w.sbn.safetensors"}'
export PYTHONPATH=/folder/of/mynet
uvicorn examples.fastapi_service:web
curl localhost:8000/predict -H 'content-type: application/json' -d '{"inputs": [[0.1, 0.2, 0.3, 0.4]]}'  # of 4 numbers

An example is numbers, or an image as {"base64": "..."}. The limits are STOCHBN_MAX_BODY (bytes), STOCHBN_MAX_ITEMS
(examples in a request) and STOCHBN_MAX_PIXELS (of an image). The answer to a request that is too large is 413.

With "monitor": true in STOCHBN_SCORER, curl localhost:8000/shift tells whether the examples of all requests are still
like the training data. Each worker process of uvicorn watches its own.
"""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException

from stochbn.deploy import BodyLimit, Limits, Scorer

limits = Limits.from_environment()
web = FastAPI()
web.add_middleware(BodyLimit, limit=limits.body)
score = Scorer(**{"threads": 1, "pixels": limits.pixels, **json.loads(os.environ["STOCHBN_SCORER"])})
pool = ThreadPoolExecutor(os.cpu_count())


@web.post("/predict")
async def predict(inputs: Annotated[list[Any], Body(embed=True)]) -> list[dict[str, Any]]:
    """Class, probability and uncertainties of every example."""
    if len(inputs) > limits.items:
        raise HTTPException(413, f"got {len(inputs)} examples, at most {limits.items} are taken at a time")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, score.answer, inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise HTTPException(422, str(error)) from error


@web.get("/shift")
def shift() -> dict[str, Any]:
    """Whether the examples are still like the training data, and whether the alarm sounds."""
    try:
        return score.shift()
    except ValueError as error:
        raise HTTPException(404, str(error)) from error


@web.get("/healthz")
def healthz() -> dict[str, str]:
    """Whether the network is loaded."""
    return {"status": "ok"}
