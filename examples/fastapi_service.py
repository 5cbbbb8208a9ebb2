"""Predictions with uncertainty by FastAPI.

export STOCHBN_SCORER='{"model": "mynet:build", "weights": "w.pt", "posterior": "w.sbn.safetensors"}'
export PYTHONPATH=/folder/of/mynet
python examples/fastapi_service.py  # or: uvicorn examples.fastapi_service:web, which waits for slow headers for ever
curl localhost:8000/predict -F picture=@photo.jpg -F picture=@other.jpg
curl localhost:8000/predict -H 'content-type: application/json' -d '{"inputs": [[0.1, 0.2, 0.3, 0.4]]}'  # of 4 numbers

STOCHBN_SCORER has the arguments of stochbn.deploy.Scorer; "monitor": true has /shift and /metrics tell whether the
examples are still like the training data. STOCHBN_EXAMPLE is an example to warm up with, in JSON as in a request, for
networks of which none can be made up. The limits are STOCHBN_MAX_BODY (bytes), STOCHBN_MAX_ITEMS (examples in a
request), STOCHBN_MAX_PIXELS (of an image), STOCHBN_MAX_SECONDS and STOCHBN_MAX_WAITING (examples). HOST and PORT say
where it listens.
"""

import json
import os

from stochbn.deploy import Limits, application

limits = Limits.from_environment()
web = application(
    json.loads(os.environ["STOCHBN_SCORER"]), limits, example=json.loads(os.environ.get("STOCHBN_EXAMPLE", "null"))
)

if __name__ == "__main__":
    import uvicorn

    from stochbn.deploy.headers import headers_within

    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000"))
    uvicorn.run(web, host=host, port=port, http=headers_within(limits.seconds))
