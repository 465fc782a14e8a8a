"""Floor: placeholder."""


class Floor:
    """Bits of devices."""

    all_devices: int

    def bits_back(self, devices: int) -> int:
        """Bits that become free."""
        return devices
