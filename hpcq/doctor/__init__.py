"""``hpcq doctor``: what a site allows, found out by trying it on the login node and in a pilot on a compute node.

`report` says what the findings mean (pure), `login` looks at this host, `node` is the function that runs on the compute
node, `trip` brings it there and back through a queue of its own. How it is shown is the command's business
(`hpcq.cli.doctor`).
"""
