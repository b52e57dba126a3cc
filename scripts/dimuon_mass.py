"""The mass of muon pairs, one task per range of events, read over XRootD by pilots on compute nodes.

python dimuon_mass.py root://HOST:1094//store/uproot-Zmumu.root --output dimuon_mass.png
"""

import argparse
import sys
import time
from collections import Counter

import numpy as np
import uproot
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

import hpcq

EDGES = np.linspace(60, 120, 61)  # GeV
EVENTS, STEP = 2304, 96


def count_masses(url, start, stop):
    """Histogram of sqrt(E² - p²) of the muon pairs of events [start, stop)."""
    with uproot.open(url) as file:
        names = [f"{quantity}{muon}" for quantity in ("E", "px", "py", "pz") for muon in (1, 2)]
        muon = file["events"].arrays(names, entry_start=start, entry_stop=stop, library="np")
    energy, px, py, pz = (muon[f"{quantity}1"] + muon[f"{quantity}2"] for quantity in ("E", "px", "py", "pz"))
    return np.histogram(np.sqrt(energy**2 - px**2 - py**2 - pz**2), EDGES)[0]


def wait_for_pilots(queue, count):
    """Without this the first pilot may have done all before the second is up: the file is small."""
    while sum(pilot["state"] == "ready" for pilot in queue.pilots()) < count:
        if failed := [pilot["message"] for pilot in queue.pilots() if pilot["state"] == "failed"]:
            sys.exit(f"a pilot cannot work: {failed[0]}")
        time.sleep(0.1)


def run(queue, url, network):
    """Hand out the tasks and add up what comes back."""
    masses, nodes = np.zeros(len(EDGES) - 1, dtype=int), Counter()
    for start in range(0, EVENTS, STEP):
        task = hpcq.PythonTask(count_masses, url, start, min(start + STEP, EVENTS))
        queue.submit(task.set(network=network, tag="dimuon"))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("events", total=EVENTS)
        while not queue.empty():
            if task := queue.wait(5):
                masses += task.result()
                nodes[task.hostname] += 1
                progress.advance(bar, STEP)
    return masses, nodes


def peak(masses):
    """Position of the Z: the mean of the histogram within 5 GeV of its highest bin."""
    centres = (EDGES[:-1] + EDGES[1:]) / 2
    near = abs(centres - centres[masses.argmax()]) <= 5
    return float(np.average(centres[near], weights=masses[near]))


def show(masses):
    """The histogram on a terminal, 3 GeV a line."""
    rows = masses.reshape(-1, 3).sum(axis=1)
    for low, count in zip(EDGES[::3], rows, strict=False):
        print(f"  {low:5.0f} GeV {count:5d} {'█' * round(50 * count / max(rows.max(), 1))}")


def plot(masses, position, output):
    """The histogram as a picture, its peak marked."""
    axes = (figure := Figure()).add_subplot()
    axes.stairs(masses, EDGES, fill=True, alpha=0.6)
    axes.axvline(position, color="crimson", label=f"peak: {position:.2f} GeV")
    axes.set(xlabel="dimuon mass [GeV]", ylabel=f"events / {EDGES[1] - EDGES[0]:.0f} GeV")
    axes.legend()
    figure.savefig(output, dpi=120)


def main():
    """The analysis, start to end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--name", default="dimuon", help="name of the queue")
    parser.add_argument("--output", default="dimuon_mass.png")
    parser.add_argument("--network", default="wan", help="wan: only through the tunnel; any: wherever")
    parser.add_argument("--pilots", type=int, default=0, help="wait for so many before handing out tasks")
    parser.add_argument("--keep-open", action="store_true", help="keep the queue until standard input ends")
    options = parser.parse_args()
    with hpcq.Queue(name=options.name) as queue:
        wait_for_pilots(queue, options.pilots)
        masses, nodes = run(queue, options.url, options.network)
        pilots = queue.pilots()
        position = peak(masses)
        show(masses)
        plot(masses, position, options.output)
        print(f"Z peak at {position:.2f} GeV from {masses.sum()} muon pairs in the window; plot: {options.output}")
        print("tasks per node:", ", ".join(f"{node} {count}" for node, count in sorted(nodes.items())))
        for pilot in pilots:
            kind, seconds = pilot["tunnel_kind"] or "none", pilot["tunnel_seconds"]
            print(f"pilot on {pilot['hostname']}: tunnel {kind}, up after {seconds:.1f} s")
        if options.keep_open:
            print("queue stays open", flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
