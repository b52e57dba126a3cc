"""The harness on the site it was made for: a short run from a compute node through a gateway on the login node."""

from __future__ import annotations

import json

from simulated_site.client import Site

from vpn.config import MODES


def test_a_short_run(xrootd: Site) -> None:
    python = xrootd.description["python"]
    options = ["--site", "--workers", "1", "--rounds", "1", "--seconds", "0.3", "--warmup", "0.2", "--json"]
    done = xrootd.run("login", [python, "-m", "hpcq", "bench", "tunnel", *options], user=False, timeout=280)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    rows = {row["label"]: row for row in report["rows"]}
    assert set(rows) == {"native", "plain", *MODES} - {"none", "auto"}
    for mode in ("native", "relay", "openconnect", "plain"):
        assert not rows[mode]["problem"], rows[mode]
        assert all(point["bits_per_second"] for point in rows[mode]["points"]), rows[mode]
        assert rows[mode]["copies"] or mode == "plain", rows[mode]
    # The compute node has no way out that slirp4netns could use.
    assert "slirp" not in rows or rows["slirp"]["problem"]
