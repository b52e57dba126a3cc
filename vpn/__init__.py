"""vpn: rootless tunnels out of compute nodes; useful without hpcq."""
