"""Real queues with local pilots, which can be made to seem to be on different hosts."""

import pytest

import hpcq


@pytest.fixture
def open_queue(tmp_path, monkeypatch):
    """Makes queues with pilots that are ready; they are closed at the end."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    queues = []

    def make(pilots=1, cores=1, memory=None, **options):
        queue = hpcq.Queue(f"q{len(queues)}", address="127.0.0.1", **options)
        queues.append(queue)
        if pilots:
            queue.submit_pilots(pilots, cores=cores, **({"memory": memory} if memory else {}))
            assert len(queue.wait_for_pilots(pilots, 90)) == pilots
        return queue

    yield make
    for queue in queues:
        queue.close()
