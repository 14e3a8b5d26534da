"""Which network interface of this machine has an address: gloo is told an interface's name, not an address."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915  # "the IPv4 address of this interface", of Linux
_IPV6 = Path("/proc/net/if_inet6")  # a line an address: 32 hexadecimal digits, number, prefix, scope, flags, name


def interface_of(address: str) -> str | None:
    """The name, such as "eth0", of the interface that has this address first of all; None where none is found."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        lines = _IPV6.read_text().splitlines() if _IPV6.exists() else []
        return next((line.split()[5] for line in lines if int(line[:32], 16) == int(wanted)), None)
    for _, name in socket.if_nameindex():
        if _ipv4(name) == wanted:
            return name
    return None


def _ipv4(name: str) -> ipaddress.IPv4Address | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            found = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # an interface without such an address, or another system
        return None
    return ipaddress.IPv4Address(found[20:24])
