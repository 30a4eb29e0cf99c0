"""Checks of a model's golden file, pass by pass (specification, sections 10.3 and 10.4). A pass whose quantities the file
does not hold is not run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import svf_fast
from parity_rules.account import Account
from parity_rules.models import MODELS, Model, TrainingMode
from svf_fast.train.backbones import STAGES
from svf_fast.train.methods import Losses

# of section 10.4
MAP_LIMIT = 1e-4
LOSS_LIMIT = 1e-4
GRADIENT_LIMITS: dict[TrainingMode, float] = {"fixbn": 1e-3, "bntrain": 1e-2}
NORM_FLOOR_SHARE = 1e-4  # of the largest norm of the list: a true zero's norm is rounding noise
BACKBONE_NORM_LIMIT = 2e-3
SINGULAR_VALUE_LIMIT = 1e-5
SINGULAR_GRADIENT_LIMIT = 5e-3
STATISTICS_LIMIT = 1e-5

# what a file says of itself and of the run that made it
SETTINGS = ("model", "backbone", "shot", "size", "batch", "n_base", "param_seed", "input_seed", "torch")
REFERENCE_NOISE = ("max_abs_diff_vs_float64", "grad_rel_fixbn", "grad_rel_bntrain", "backbone_conv_grad_rel")
NOISE_OF_SINGULAR_GRADIENTS = "noise/svf_dS_rel/"


@dataclass(frozen=True)
class Check:
    """A file's model and the account to fill."""

    account: Account
    model: Model

    def holds(self, *prefixes: str) -> bool:
        return any(self.account.golden.with_prefix(prefix) for prefix in prefixes)


def check_model(account: Account, memory_format: torch.memory_format) -> Iterator[tuple[str, Callable[[], None]]]:
    """The passes to run, one after the other, each with what it is about."""
    golden = account.golden
    check = Check(account, MODELS[golden.settings["model"]](golden, memory_format))
    account.describes_the_reference(*SETTINGS)
    account.describes_the_reference(
        *(
            name
            for name in golden.expected
            if name.startswith("noise/")
            and (name.rpartition("/")[2] in REFERENCE_NOISE or name.startswith(NOISE_OF_SINGULAR_GRADIENTS))
        )
    )
    yield "entries", lambda: check_entries(check)
    yield "outputs", lambda: check_outputs(check)
    for mode in GRADIENT_LIMITS:
        if check.holds(f"losses/{mode}/", f"losses/{mode}_float64_run/", f"grad_norms/{mode}/", f"grad_{mode}/"):
            yield f"a step, {mode}", lambda mode=mode: check_training_step(check, mode)
    if check.holds("grad_norms/backbone_conv_fixbn/", "losses/backbone_grad_fixbn/", "svf/dS/"):
        yield "backbone gradients", lambda: check_full_fine_tuning(check)
    if check.holds("svf/"):
        yield "singular values", lambda: check_singular_values(check)


def check_entries(check: Check) -> None:
    """State-dict keys with shapes in their order, buffers, and numbers of parameters."""
    module = check.model.build()
    state = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    check.account.equal("state_dict", check.model.with_aliases(state))
    buffers = {name: list(buffer.shape) for name, buffer in module.named_buffers()}
    check.account.equal("buffers", list(check.model.with_aliases(buffers)))
    parameters = dict(module.named_parameters())
    check.account.equal("n_parameters", sum(parameter.numel() for parameter in parameters.values()))
    backbone = [parameter.numel() for name, parameter in parameters.items() if is_of_backbone(name)]
    check.account.equal("n_parameters_backbone", sum(backbone))


@torch.no_grad()
def check_outputs(check: Check) -> None:
    """Eval mode: what the model gives, its intermediates, the features of its stages, and its variants."""
    expected = check.account.golden.expected
    module = check.model.build()
    actual = check.model.outputs(module)
    features = check.model.episodes.query_images
    for stage in STAGES:
        features = module.get_submodule(stage)(features)
        actual[f"query_{stage}/spatial_mean"] = features.mean(dim=(2, 3))
        actual[f"query_{stage}/channel_mean"] = features.mean(dim=1)
    # the query's features are in files of one shot only
    check.account.note_absent(*(name for name in actual if name != "query_feat"))
    if not any(name in expected for name in ("out", "final_out")):
        check.account.complaints.append("the file holds no output of the model")
    for name, (output, options) in check.model.variants().items():
        if name in expected:
            actual[name] = check.model.outputs(check.model.build(**options))[output]
    for name, tensor in actual.items():
        largest = f"noise/{name}/max_abs"
        noise = expected[f"{largest}_diff_vs_float64"] / expected[largest] if largest in expected else None
        if name in expected:
            check.account.close(name, tensor, MAP_LIMIT, reference_noise=noise)
        if largest in expected:
            check.account.close(largest, tensor.abs().max(), MAP_LIMIT)


def check_training_step(check: Check, mode: TrainingMode) -> None:
    """Losses and gradients with a frozen backbone (of a base learner: of everything), BatchNorm in eval mode ("fixbn")
    or in train mode ("bntrain"), and in train mode what its running statistics have become."""
    account = check.account
    module = check.model.for_training(mode)
    losses = check.model.losses(module)
    losses.total.backward()
    compare_losses(account, losses, mode, f"{mode}_float64_run")

    compare_norms(account, f"grad_norms/{mode}/", trained_gradients(module), GRADIENT_LIMITS[mode])
    whole = account.golden.with_prefix(f"grad_{mode}/")
    norms = account.golden.settings["grad_norms"][mode]
    for key in whole:
        gradient = module.get_parameter(key).grad
        if gradient is None:
            account.complaints.append(f"{key} has no gradient ({mode})")
            continue
        floor = NORM_FLOOR_SHARE * max(norms.values())
        account.close(f"grad_{mode}/{key}", gradient, GRADIENT_LIMITS[mode], to="norm", floor=floor)
    if mode == "bntrain":
        for name in account.golden.with_prefix("bntrain/"):
            account.close(f"bntrain/{name}", module.get_buffer(name), STATISTICS_LIMIT)
        for name in account.golden.with_prefix("bntrain_num_batches_tracked/"):
            updates = module.get_buffer(f"{name}.num_batches_tracked")
            account.equal(f"bntrain_num_batches_tracked/{name}", int(updates))


def check_full_fine_tuning(check: Check) -> None:
    """Norms of dL/dW of the backbone's convolutions, and from dL/dW the singular values' gradients uᵢᵀ (dL/dW) vᵢ."""
    account = check.account
    module = check.model.tuned("full")
    losses = check.model.losses(module)
    losses.total.backward()
    compare_losses(account, losses, "backbone_grad_fixbn")
    gradients = {
        key: gradient
        for key, gradient in trained_gradients(module).items()
        if is_of_backbone(key) and gradient.dim() == 4  # VGG's convolutions have biases, of which the file says nothing
    }
    compare_norms(account, "grad_norms/backbone_conv_fixbn/", gradients, BACKBONE_NORM_LIMIT)
    for layer in account.golden.with_prefix("svf/dS/"):
        gradient = gradients.get(f"{layer}.weight")
        if gradient is None:  # the names above tell
            continue
        weight = module.get_parameter(f"{layer}.weight").detach()
        u, _, vt = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
        projected = (u * (gradient.double().flatten(1) @ vt.mT)).sum(dim=0)
        compare_singular_gradient(account, layer, projected, how=" from dL/dW")


def check_singular_values(check: Check) -> None:
    """The singular values and their gradients through the ``svf`` strategy's fused layers, in float32."""
    account = check.account
    module = check.model.tuned("svf")
    losses = check.model.losses(module)
    losses.total.backward()
    compare_losses(account, losses, "backbone_grad_fixbn", how=" through svf")
    values = svf_fast.singular_values(module)
    for layer in account.golden.with_prefix("svf/S/"):
        account.close(f"svf/S/{layer}", values[layer], SINGULAR_VALUE_LIMIT, to="each")
    for layer in account.golden.with_prefix("svf/dS/"):
        gradient = values[layer].grad
        if gradient is None:
            account.complaints.append(f"the singular values of {layer} have no gradient")
            continue
        compare_singular_gradient(account, layer, gradient)


def compare_losses(account: Account, losses: Losses, *modes: str, how: str = "") -> None:
    """The total and its parts, with what the file holds under each of ``modes``."""
    actual = {**losses.parts, "total": losses.total}
    for mode in modes:
        expected = account.golden.with_prefix(f"losses/{mode}/")
        if not expected:
            continue
        account.same_names(f"losses of the method ({mode})", set(actual), set(expected))
        for part in expected:
            if part in actual:
                account.close(f"losses/{mode}/{part}", actual[part], LOSS_LIMIT, how=how)


def compare_norms(account: Account, prefix: str, gradients: dict[str, Tensor], limit: float) -> None:
    """Exactly the parameters of the file's list have gradients, of those norms."""
    keys = account.golden.with_prefix(prefix)
    if not keys:
        return
    account.same_names(f"what has a gradient ({prefix.rstrip('/')})", set(gradients), set(keys))
    floor = NORM_FLOOR_SHARE * max(account.golden.expected[prefix + key] for key in keys)
    for key in keys:
        if key in gradients:
            account.close(prefix + key, gradients[key].double().norm(), limit, floor=floor)


def compare_singular_gradient(account: Account, layer: str, gradient: Tensor, how: str = "") -> None:
    # where our rounding and the reference's differ, a few ReLUs and winners of the prior's maximum flip, and each flip
    # is a step in the gradient; the reference's own float32 run has such flips too
    noise = account.golden.expected.get(f"{NOISE_OF_SINGULAR_GRADIENTS}{layer}")
    account.close(f"svf/dS/{layer}", gradient, SINGULAR_GRADIENT_LIMIT, to="norm", how=how, reference_noise=noise)


def trained_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {key: parameter.grad for key, parameter in module.named_parameters() if parameter.grad is not None}


def is_of_backbone(key: str) -> bool:
    return key.partition(".")[0] in STAGES
