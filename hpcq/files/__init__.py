"""Files of tasks: what users name, how contents travel, where they are kept.

::

    user's thread         manager's thread                              pilot
    sources --submit-->   desk: digests, waits for producers --spec-->  staging: obtain inputs --> run --> collect
                          counter  <=======data connections=========>   (cache, peers)      outputs, then the result
                          landing: temporaries beside the destination, renamed together when the task succeeded

Contents are named by their digest (SHA-256) and travel on connections of their own, never on the link that
carries tasks, in chunks, so that neither side holds more than a few of them. What is fetched is verified by whoever
fetches it. A directory travels as one tar stream made the same way each time, so it has a digest like a file.

Modules: `names` (rules of names in a sandbox), `sources` (what users write), `digests`, `pack` (directories), `wire`
(the data protocol), `holders` (who has what; pure), `desk`, `counter` and `landing` (the manager's side), `cache`
(a node's), `threads` (what blocks), `urls`. The pilot's side is `hpcq.pilot.staging`.
"""
