"""The throughput harness: native against each tunnel mode, as a user's programs would see it.

``traffic`` moves bytes (the only part that runs inside a tunnel or on the far side), ``agent`` opens tunnels on a
compute node and gateways on a login node, ``run`` drives agents through a ``plan``; ``figures``, ``goals`` and
``show`` turn what was measured into tables and a plot and do no I/O but the plot's file.
"""
