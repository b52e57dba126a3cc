"""A cluster without a way out, simulated on one machine with the real programs.

Everything lives in one fresh set of pid, mount, network, uts and ipc namespaces. When their first process ends,
for whatever reason, the kernel ends every process of the site and drops its mounts and links, so nothing can be
left running or mounted.

Read in this order: `plan` (names, addresses, paths), `launch` (the namespaces and their first process), `build`
(the order in which the site comes up), `client` (how tests and the demo reach the hosts).
"""
