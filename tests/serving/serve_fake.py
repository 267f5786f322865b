"""Serves a fake engine in a process of its own, which signals can be sent to: prints the URL, then what happened."""

import json
import sys

from serving.api_config import ApiConfig
from serving.server import serve_http
from tests.serving.fake_engine import FakeEngine, long_text

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    engine = FakeEngine(characters=options["step"], delay=0.01)
    engine.script = lambda request: long_text(request, options["characters"])
    engine.max_context = 10**9
    config = ApiConfig(port=0, grace_seconds=options["grace"], stream_buffer=1 << 20)
    status = serve_http(engine, config, lambda url: print(url, flush=True))
    print(json.dumps(sorted(engine.ended.values())), flush=True)
    sys.exit(status)
