"""Is it faster to move the pages of a preempted sequence to the host and back, or to compute its tokens again?"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes a second, one way. A GPU: pinned memory over PCIe 5 x16, of whose 63 GB/s about 50 arrive. A CPU: pages are gathered and
# then copied, two passes of a core's 10 GB/s.
BANDWIDTH = {"cuda": 50e9, "cpu": 5e9}
# Floating-point operations a second in the matrix products of a prompt. A GPU: some 40 % of the 989e12 that an H100 or H200 does
# in 16 bits, which is what prompts of some thousand tokens reach. A CPU: some cores with vector units.
ARITHMETIC = {"cuda": 400e12, "cpu": 100e9}


@dataclass(frozen=True)
class SwapCost:
    """What is known of a model on its device; each number can be given as it was measured.

    bytes_a_token       of keys and values in all layers (`SwapSpace.bytes_a_token`)
    seconds_a_token     to compute one, among many
    bytes_a_second      between host and device, one way
    """

    bytes_a_token: float
    seconds_a_token: float
    bytes_a_second: float

    @classmethod
    def estimated(
        cls,
        bytes_a_token: float,
        parameters: int,
        device: str,
        tokens_a_second: float | None = None,
        bytes_a_second: float | None = None,
    ) -> SwapCost:
        """With what was not measured estimated for a `device` of this type ("cuda", "cpu").

        A token takes two operations a parameter, a product and a sum. Attention comes on top, and is left out: so computing is
        rather taken for faster than it is. It is taken for slower in a mixture of experts, which uses a part of its parameters:
        give `tokens_a_second` there.
        """
        kind = device if device in BANDWIDTH else "cuda"
        seconds = 2 * parameters / ARITHMETIC[kind] if tokens_a_second is None else 1 / tokens_a_second
        return cls(bytes_a_token, seconds, bytes_a_second or BANDWIDTH[kind])

    def prefers_swap(self, held: int, missing: int) -> bool:
        """Whether to move `held` tokens out and back, rather than compute `missing` of them again (those that no prefix has)."""
        return 2 * held * self.bytes_a_token / self.bytes_a_second < missing * self.seconds_a_token
