"""The optimizer's part of a checkpoint, converted between the three kinds of Megatron-Core's optimizers.

All kinds store Adam's moments under the same keys; they differ in the keys of the fp32 master weights and in
the nesting of the common part:

    kind          master weights                 common part
    fp32          the model itself               {state: {common_step}, param_groups}
    half          optimizer.state.fp32_param.K   {optimizer: {state, param_groups}, grad_scaler}
    distributed   optimizer.state.param.K        {optimizer: {param_groups}, param_state_sharding_type}
"""

from collections.abc import Container
from typing import Any

from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from megatron_ext.checkpoint.content import inner_optimizers
from megatron_ext.checkpoint.errors import CheckpointError

RESHARDABLE = "fully_reshardable"
#: The keys that tell parameter groups apart; learning rates may change between runs.
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_MASTER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def kind_of(optimizer: MegatronOptimizer) -> str:
    """``fp32``, ``half`` or ``distributed``."""
    inner = inner_optimizers(optimizer)[0]
    if isinstance(inner, DistributedOptimizer):
        return "distributed"
    return "half" if isinstance(inner, Float16OptimizerWithFloat16Params) else "fp32"


def kind_in(common: dict[str, Any]) -> str:
    """Which kind of optimizer wrote the common part of a checkpoint."""
    part = common["optimizer"]
    if "param_state_sharding_type" in part or "distrib_optim_sharding_type" in common.get(
        "content_metadata", {}
    ):
        return "distributed"
    return "half" if "fp32_from_fp16_params" in part or "optimizer" in part else "fp32"


def adapt_common(common: dict[str, Any], optimizer: MegatronOptimizer, keep_rates: bool) -> None:
    """Convert ``common["optimizer"]`` to the form that ``optimizer`` expects, in place.

    Parameter groups get the order of ``optimizer``'s, with ``step`` as an int in each. Entries of a group
    that the checkpoint lacks keep this optimizer's value: implementations of Adam differ in them.
    ``keep_rates`` keeps the run's own learning rate limits, betas and eps (--override-opt_param-scheduler).

    Raises:
        CheckpointError: if the checkpoint's parameter groups are not the optimizer's, or its
            state was saved in a form that only the same layout and kind of optimizer can load.
    """
    part, kind = common["optimizer"], kind_of(optimizer)
    sharding = part.get("param_state_sharding_type") or common.get("content_metadata", {}).get(
        "distrib_optim_sharding_type", RESHARDABLE
    )
    fixed = kind_in(common) == "distributed" and sharding != RESHARDABLE
    if fixed and kind != "distributed":
        raise CheckpointError(
            f"its distributed optimizer state is {sharding}, which only a distributed optimizer "
            "on the same tensor and pipeline layout can load: add --use-distributed-optimizer "
            "or --no-load-optim, or save it again with --dist-ckpt-optim-fully-reshardable"
        )
    inner = part.get("optimizer", part)
    groups = _in_order_of(optimizer.param_groups, inner["param_groups"], keep_rates)
    if fixed:
        inner["param_groups"] = groups
        return
    step = inner.get("state", {}).get("common_step")
    for group in groups:
        if step is not None or group.get("step") is not None:
            group["step"] = int(step if step is not None else group["step"])
    if kind == "distributed":
        adapted: dict[str, Any] = {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": RESHARDABLE,
        }
    elif kind == "half":
        adapted = {"optimizer": {"param_groups": groups, "state": {}}}
    else:
        adapted = {"param_groups": groups, "state": {}}
    if kind != "fp32" and "grad_scaler" in part:
        adapted["grad_scaler"] = part["grad_scaler"]
    common["optimizer"] = adapted


def _in_order_of(
    current: list[dict[str, Any]], saved: list[dict[str, Any]], keep_rates: bool
) -> list[dict[str, Any]]:
    by_identity = {_identity(group): group for group in saved}
    ordered = []
    for group in current:
        match = by_identity.get(_identity(group))
        if match is None or len(saved) != len(current):
            raise CheckpointError(
                f"its optimizer has {len(saved)} parameter groups {sorted(by_identity)}, this run's "
                f"{len(current)} do not match ({', '.join(_IDENTITY)}); "
                "--no-load-optim starts the optimizer afresh"
            )
        kept = ("max_lr", "min_lr", "betas", "eps") if keep_rates else ()
        rates = {key: group[key] for key in kept if key in group}
        merged = {**group, **match, **rates}
        # Megatron-Core 0.19 matches groups by these too, when it loads them.
        group.update({key: merged[key] for key in ("max_lr", "min_lr") if key in merged})
        ordered.append({key: value for key, value in merged.items() if key != "params"})
    return ordered


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _IDENTITY)


def master_key(key: str, available: Container[str]) -> str:
    """The checkpoint's key of the master weight that the optimizer calls ``key``."""
    for prefix in _MASTER_PREFIXES:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            candidates = [key, *(other + name for other in _MASTER_PREFIXES), name]
            return next((candidate for candidate in candidates if candidate in available), key)
    return key
