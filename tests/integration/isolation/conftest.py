"""The engine's queues and pilots, for tests of isolation."""

import importlib.util
import sys
from pathlib import Path

_ENGINE = Path(__file__).parent.parent / "engine"
sys.path.append(str(_ENGINE))
_spec = importlib.util.spec_from_file_location("engine_conftest", _ENGINE / "conftest.py")
_engine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_engine)

place = _engine.place
open_queue = _engine.open_queue
queue = _engine.queue
start_pilot = _engine.start_pilot
pilot = _engine.pilot
no_descriptor_is_left = _engine.no_descriptor_is_left
