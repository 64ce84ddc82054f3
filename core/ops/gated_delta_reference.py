"""The gated delta rule as a plain loop over time: slow and right, the oracle of every fast form.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), equation 10, per value head with state S
[Dk, Dv]:
    S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T        o_t = S_t^T q_t        a_t = exp(g_t)
"""

from ..machine.backend import mx


def gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the recurrence over T steps; return outputs [B, T, Hv, Dv] and the state after them.

    q, k [B, T, Hk, Dk] (normalised, q scaled), v [B, T, Hv, Dv], g (log decay) and beta [B, T, Hv], and state
    [B, Hv, Dk, Dv] are float32.
    """
    repeats = v.shape[2] // k.shape[2]
    q, k = mx.repeat(q, repeats, axis=2), mx.repeat(k, repeats, axis=2)  # [B, T, Hv, Dk]
    outputs = []
    for t in range(v.shape[1]):
        state = state * mx.exp(g[:, t])[..., None, None]  # [B, Hv, Dk, Dv]
        memory = (state * k[:, t, :, :, None]).sum(axis=2)  # [B, Hv, Dv]
        delta = (v[:, t] - memory) * beta[:, t, :, None]  # [B, Hv, Dv]
        state = state + k[:, t, :, :, None] * delta[:, :, None, :]
        outputs.append((state * q[:, t, :, :, None]).sum(axis=2))
    return mx.stack(outputs, axis=1), state
