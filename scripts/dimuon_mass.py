"""The mass of muon pairs, one task per range of events, read over XRootD by pilots on compute nodes."""

import argparse
import sys
from collections import Counter

import numpy as np
import uproot
from matplotlib.figure import Figure
from rich.progress import track

import hpcq

EDGES = np.linspace(60, 120, 61)  # GeV
EVENTS, STEP = 2304, 96


def count_masses(url, start, stop):
    """Histogram of sqrt(E² - p²) of the muon pairs of events [start, stop)."""
    names = [f"{quantity}{muon}" for quantity in ("E", "px", "py", "pz") for muon in (1, 2)]
    with uproot.open(url) as file:
        muon = file["events"].arrays(names, entry_start=start, entry_stop=stop, library="np")
    energy, px, py, pz = (muon[f"{quantity}1"] + muon[f"{quantity}2"] for quantity in ("E", "px", "py", "pz"))
    return np.histogram(np.sqrt(energy**2 - px**2 - py**2 - pz**2), EDGES)[0]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("url", help="root://HOST:1094//store/uproot-Zmumu.root")
parser.add_argument("--name", default="dimuon", help="name of the queue")
parser.add_argument("--network", default="wan", help="wan: only through the tunnel; any: wherever")
parser.add_argument("--pilots", type=int, default=1, help="wait for so many before handing out tasks")
parser.add_argument("--output", default="dimuon_mass.png")
parser.add_argument("--keep-open", action="store_true", help="keep the queue until standard input ends")
options = parser.parse_args()

with hpcq.Queue(name=options.name) as queue:
    pilots = queue.wait_for_pilots(options.pilots)
    for start in range(0, EVENTS, STEP):
        task = hpcq.PythonTask(count_masses, options.url, start, min(start + STEP, EVENTS))
        queue.submit(task.set(network=options.network, tag="dimuon"))

    masses, nodes = np.zeros(len(EDGES) - 1, dtype=int), Counter()
    for task in track(iter(queue.wait, None), "events", total=-(-EVENTS // STEP)):
        masses += task.result()
        nodes[task.hostname] += 1

    near = abs(EDGES[:-1] - EDGES[masses.argmax()]) <= 5  # GeV from the highest bin
    peak = np.average(EDGES[:-1][near] + 0.5, weights=masses[near])
    for low, count in zip(EDGES[::3], rows := masses.reshape(-1, 3).sum(axis=1), strict=False):
        print(f"  {low:5.0f} GeV {count:5d} {'█' * round(50 * count / rows.max())}")
    axes = (figure := Figure()).add_subplot(xlabel="dimuon mass [GeV]", ylabel="events / GeV")
    axes.stairs(masses, EDGES, fill=True, alpha=0.6)
    axes.axvline(peak, color="crimson", label=f"peak: {peak:.2f} GeV")
    axes.legend()
    figure.savefig(options.output, dpi=120)
    print(f"Z peak at {peak:.2f} GeV from {masses.sum()} muon pairs in the window; plot: {options.output}")
    print("tasks per node:", ", ".join(f"{node} {count}" for node, count in sorted(nodes.items())))
    for pilot in pilots:
        print(f"pilot on {pilot.hostname}: {pilot.tunnel_kind or 'no'} tunnel, up after {pilot.tunnel_seconds:.1f} s")
    if options.keep_open:
        print("queue stays open", flush=True)
        sys.stdin.read()
