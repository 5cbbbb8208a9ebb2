"""Predictions with uncertainty as a Ray Serve deployment: requests that come together go through the network together.

export PYTHONPATH=/folder/of/mynet
serve run examples.ray_serve:app model=mynet:build weights=/data/w.pt posterior=/data/w.sbn.safetensors
curl localhost:8000/predict -H 'content-type: application/json' -d '{"inputs": [[0.1, 0.2, 0.3, 0.4]]}'  # of 4 numbers

An example is numbers, or an image as {"base64": "..."}. The limits are STOCHBN_MAX_BODY (bytes), STOCHBN_MAX_ITEMS
(examples in a request) and STOCHBN_MAX_PIXELS (of an image), as set where the application is started. The answer to a
request that is too large is 413. Ray's own proxy reads bodies before that, without a limit: put a server before it.
"""

from itertools import accumulate
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException
from ray import serve

from stochbn.deploy import BodyLimit, Limits, Scorer

limits = Limits.from_environment()
web = FastAPI()
web.add_middleware(BodyLimit, limit=limits.body)


@serve.deployment(max_ongoing_requests=64)
@serve.ingress(web)
class Service:
    """A network and its posterior; each replica loads both once."""

    def __init__(self, scorer: dict[str, Any], limits: Limits = limits) -> None:
        self.score = Scorer(**{"threads": 1, "pixels": limits.pixels, **scorer})
        self.items = limits.items

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def together(self, requests: list[list[Any]]) -> list[Any]:
        """The rows of each request, or what is wrong with it."""
        try:
            rows = self.score.answer([one for inputs in requests for one in inputs])
        except (RuntimeError, TypeError, ValueError):
            rows = []
        if not rows or any(row["error"] for row in rows):  # one may spoil the batch: each for itself
            return [self.alone(inputs) for inputs in requests]
        ends = accumulate(map(len, requests))
        return [rows[end - len(inputs) : end] for inputs, end in zip(requests, ends, strict=True)]

    def alone(self, inputs: list[Any]) -> list[Any] | str:
        """The rows of one request, or what is wrong with it."""
        try:
            return self.score.answer(inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            return str(error)

    @web.post("/predict")
    async def predict(self, inputs: Annotated[list[Any], Body(embed=True)]) -> list[dict[str, Any]]:
        """Class, probability and uncertainties of every example."""
        if len(inputs) > self.items:
            raise HTTPException(413, f"got {len(inputs)} examples, at most {self.items} are taken at a time")
        answer = await self.together(inputs)
        if isinstance(answer, str):
            raise HTTPException(422, answer)
        return answer

    @web.get("/healthz")
    def healthz(self) -> dict[str, str]:
        """Whether the network is loaded."""
        return {"status": "ok"}


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application, from the arguments of `stochbn.deploy.Scorer`."""
    return Service.bind(arguments, limits)
