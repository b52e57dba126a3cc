"""The addresses inside the gateway's namespace: constants."""

CLIENTS = "198.18.0.0/16"  # RFC 2544's range for tests: no real server has such an address
UPLINK = "198.19.0.0/24"
UPLINK_HOST = "198.19.0.2"  # slirp4netns' second address: the way out
UPLINK_DNS = "198.19.0.3"  # slirp4netns' name server: third address of its network
UPLINK_GUEST = "198.19.0.100"
DNS_PORT = 53
OUT = "out0"  # the device that the data plane reads
PLANE = "198.19.1.1"  # on lo: where redirected TCP ends; it stays when a tunnel's device comes and goes
