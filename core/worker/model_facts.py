"""A loaded model as the value that front ends are sent."""

from dataclasses import asdict

from ..conversation.session import Session
from ..engine.engine import Engine
from ..generation.sampling import resolve_sampling
from .wire import ModelInfo


def describe_model(engine: Engine, session: Session) -> ModelInfo:
    """Describe the model of a session's engine."""
    model, thinks = engine.model, engine.thinks_by_default
    forms = {operation: form for (operation, _), form in sorted(model.tuner.winners.items())}
    notices = [*engine.notices, *model.repairs]
    if model.graph is not None:
        forms["step, 1 token"] = "launches" if model.graph.notice else "one graph"
        notices += [model.graph.notice] if model.graph.notice else []
    return ModelInfo(
        name=engine.name,
        path=str(engine.folder),
        nbytes=model.nbytes,
        bits_per_weight=8 * model.nbytes / max(model.parameters, 1),
        max_position_embeddings=engine.config.max_position_embeddings,
        context_limit=session.context_limit,
        moe=engine.config.is_moe,
        mtp=model.mtp is not None,
        can_preserve_thinking=engine.template.can_preserve_thinking,
        thinks_by_default=thinks,
        notices=tuple(notices),
        forms=forms,
        parameters=asdict(resolve_sampling({}, engine.generation_config, thinks)),
        template=engine.template.source,
        bytes_per_token=model.step_nbytes,
    )
