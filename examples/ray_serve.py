"""Predictions with uncertainty as a Ray Serve deployment: the service of fastapi_service.py in every replica.

export PYTHONPATH=/folder/of/mynet
serve run examples.ray_serve:app model=mynet:build weights=/data/w.pt posterior=/data/w.sbn.safetensors
curl localhost:8000/predict -F picture=@photo.jpg

Requests, answers, limits and STOCHBN_EXAMPLE are those of fastapi_service.py; the variables are read where the
application is started. Metrics are with Ray's own, such as ray_stochbn_requests. Ray's proxy reads bodies before the
service does, without a limit: put a server before it.
"""

import json
import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from stochbn.deploy import Limits, application
from stochbn.deploy.telemetry import ray_metrics


def app(scorer: dict[str, Any]) -> serve.Application:
    """The application, from the arguments of `stochbn.deploy.Scorer`."""
    limits, example = Limits.from_environment(), json.loads(os.environ.get("STOCHBN_EXAMPLE", "null"))

    def build() -> FastAPI:
        return application(scorer, limits, example=example, telemetry=ray_metrics())

    return serve.deployment(serve.ingress(build)(), name="stochbn", max_ongoing_requests=256).bind()
