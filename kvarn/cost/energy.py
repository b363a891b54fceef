"""Energy of a step: idle power all the time, the rest in proportion to what is in use.

Law: power = idle + (peak - idle) * min(1, compute + MEMORY_POWER * memory), where `compute` and
`memory` are the shares of the time at which the arithmetic units and the memory would be busy at
their best. So prefill draws the peak and decode about half of it, as Splitwise (arXiv 2311.18677,
section 3) found; the linear law and its one constant are our choice.
"""

from kvarn.cost.devices import Device

#: power of saturated memory over that of saturated arithmetic units, above idle (our choice)
MEMORY_POWER = 0.5


def joules(device: Device, n: int, seconds: float, compute: float, memory: float) -> float:
    """Energy of `n` devices in a step of `seconds` [J].

    `compute` and `memory` are seconds for which each device's units were busy at their best.
    """
    active = min(seconds, compute + MEMORY_POWER * memory)
    return n * (device.idle_watts * seconds + (device.peak_watts - device.idle_watts) * active)
