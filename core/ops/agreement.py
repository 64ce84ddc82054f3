"""How far one result is from another, as every trial of a form measures it."""

from ..machine.backend import mx


def relative_rms(found: mx.array, wanted: mx.array) -> float:
    """Return the root mean square of the difference in float32, relative to that of `wanted`.

    `found` may have another shape of as many elements.
    """
    found, wanted = found.astype(mx.float32).reshape(wanted.shape), wanted.astype(mx.float32)
    return float(mx.sqrt(mx.square(found - wanted).mean() / mx.square(wanted).mean()))
