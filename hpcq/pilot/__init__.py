"""The program inside a batch job: connect, bring up the tunnel, prove it, run tasks, leave nothing behind.

- `main`: options, signals, the life of a pilot from first word to goodbye (the file to read first); `ending`: why and
  when it ends;
- `link`: finding and keeping the manager;
- `core`: which runner gets which task, limits, what is reported: a pure state machine; `choice`, `lanes`, `doom`,
  `durations`: what it works with;
- `pool`: the runner processes and their sockets, performing what `core` orders; `rest`: when these are read;
- `runner`: the interpreter that executes tasks one after the other, inside the tunnel's namespace; `commands`
  (with `shells`), `forks` (both `children`), `forkhooks`, `guard`: what keeps tasks apart, `usage`: what they used;
- `sampler`: what long tasks use, seen from outside;
  `traffic` (with `watch`, `sockdiag`, `account`): their bytes; `host`: which CPUs and GPUs are the pilot's own.
"""
