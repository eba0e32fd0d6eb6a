"""pcfast against what other programs computed: every recorded run, with the preset of its program."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pages import blocks_of_code
from recorded_programs import BEGIN, END, FILES, PAGE, STEPS, load, port
from torch import nn

import pcfast
from pcfast import ArgumentError, ArgumentTypeError, ShapeError, identify
from pcfast.model.grouping import flattened

EVERY_RUN = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def allowed(recorded) -> float:
    """Relative differences that are rounding: the programs computed in float64, one of them in float32."""
    return 2e-12 if recorded.meta["dtype"] == "float64" else 1e-6


def test_all_files_are_there():
    assert len(FILES) == 39
    presets = {load(path).preset for path in FILES}
    assert presets == set(pcfast.presets.PRESETS) - {"torch2pc"}  # which has recorded runs of its own


@EVERY_RUN
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_updates_and_weights(path, backend):
    recorded = load(path)
    first, after = recorded.steps(20 if backend == "eager" else 1, backend=backend)
    assert pcfast.last_run().plan.backend == backend
    assert recorded.difference(first, "grad.") < allowed(recorded)
    for count in STEPS[: len(after)]:
        assert recorded.difference(after[count], f"after{count}.") < allowed(recorded), count


@EVERY_RUN
def test_beliefs_and_errors(path):
    """Where the program shows them: after its moves, at the forward pass's weights."""
    recorded = load(path)
    meta, settings, model = recorded.meta, recorded.settings(), recorded.model()
    if settings["method"] == "incremental":
        pytest.skip("its beliefs move with the weights: test_updates_and_weights")
    size, y = meta["step_size"], recorded.arrays["y"]

    def relaxed(moves: int):
        if settings["method"] == "error_based":
            again = {"step_size": size, "num_steps": moves}
        else:
            again = {"step_size": (*[size] * moves, 0.0), "num_steps": moves + 1}
        return pcfast.relax(model, recorded.arrays["x"], y, **{**settings, **again})

    for prefix, key, states in (("v.", "v_moves", "beliefs"), ("eps.", "eps_moves", "errors")):
        if expected := recorded.under(prefix):
            result = getattr(relaxed(meta.get(key, meta["belief_moves"])), states)
            result = list(result.values()) if isinstance(result, dict) else result  # with precision by name
            assert recorded.difference({l: result[int(l)] for l in expected}, prefix) < allowed(recorded), (
                prefix
            )


def identified(recorded, model, **settings):
    updates = recorded.under("grad.")
    if recorded.meta["dtype"] == "float32":
        updates = {name: value.float() for name, value in updates.items()}
    own = recorded.settings()
    last = list(recorded.under("grad_last.").values())
    vinit = own.get("vinit")
    result = dict(
        step_size=recorded.meta["step_size"], num_steps=recorded.meta["iterations"],
        belief_optimizer=recorded.belief_optimizer, nudging=own.get("nudging"), precision=own.get("precision"),
        vinit=None if isinstance(vinit, float) else vinit, last_updates=last or None,
        optimizer=(lambda parameters: recorded.optimizer(parameters)[0]) if last else None,
    )  # fmt: skip
    return identify(
        model, recorded.arrays["x"], recorded.arrays["y"], list(updates.values()), **{**result, **settings}
    )


def names(matches) -> set[str]:
    return {match.preset.partition("(")[0] for match in matches}


def pcfast_settings_agree(match, recorded, model) -> bool:
    """What a match says it ran with gives the recorded update."""
    if match.settings["method"] == "incremental":
        return True
    model.zero_grad()
    pcfast.pc_loss(model, recorded.arrays["x"], recorded.arrays["y"], **match.settings).backward()
    result = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return recorded.difference(result, "grad.") < allowed(recorded)


@EVERY_RUN
def test_the_right_preset_is_named(path):
    recorded = load(path)
    model = recorded.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    matches = identified(recorded, model)
    met, rest = [m for m in matches if m.meets], [m for m in matches if not m.meets]
    assert matches[: len(met)] == met and recorded.preset in names(met)
    assert {m.layers for m in met} >= {"as given"} and not any(m.only_output for m in met)
    assert all(pcfast_settings_agree(m, recorded, model) for m in met[:1])
    assert all(m.difference < 1e-9 or recorded.meta["dtype"] == "float32" for m in met)
    others = [m for m in rest if not m.same_but_for_a_factor]
    assert rest[-len(others) :] == others and "when multiplied by" in str(others[0])
    assert others[0].difference == min(m.difference for m in others) > 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # every preset that meets the record is the same algorithm on this batch
    assert len({(m.settings["method"], m.settings["reduction"], m.settings["num_steps"]) for m in met}) == 1


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("pctrainer__mlp_relu_mse", "beliefs='before_activation'"),
        ("jpc__mlp_tanh_mse", "beliefs='before_activation'"),
        ("pcx__mlp_tanh_se", "beliefs='after_activation'"),
        ("spc__mlp_tanh_ce", "beliefs='after_activation'"),
    ],
)
def test_where_beliefs_sit_is_found_for_a_flat_model(name, layers):
    recorded = load(name)
    matches = identified(recorded, flattened(recorded.model()))
    met = [m for m in matches if m.meets]
    assert recorded.preset in names(met) and {m.layers for m in met} == {layers}
    assert all(m.difference > 1e-2 for m in matches if m.preset == met[0].preset and not m.meets)


@pytest.mark.parametrize("factor", [-1.0, 8.0, -0.125])
def test_another_sign_or_scale_is_told(factor):
    recorded = load("preco__mba_relu")  # 8 rows
    grads = [factor * g for g in recorded.under("grad.").values()]
    arguments = recorded.model(), recorded.arrays["x"], recorded.arrays["y"]
    settings = {"step_size": recorded.meta["step_size"], "num_steps": recorded.meta["iterations"]}
    result = [m for m in identify(*arguments, grads, **settings) if not m.meets]
    (preco,) = (m for m in result if m.preset == "preco" and m.same_but_for_a_factor)
    assert preco.factor == pytest.approx(factor) and preco.after_factor < 1e-12
    assert result[0].same_but_for_a_factor and "when multiplied by" in str(result[0])
    if factor == -1:
        assert result[0].factor == pytest.approx(-1)
    assert not any(
        m.meets or m.same_but_for_a_factor for m in identify(*arguments, grads, step_size=0.2, num_steps=20)
    )


def test_an_incremental_program_is_known_by_its_last_gradients():
    """The first ones are the same whatever the relaxation does."""
    recorded = load("pcx_ipc__mlp_leaky_se_momentum")
    wrong = {"step_size": 0.7, "num_steps": 3, "belief_optimizer": None}
    assert not any(m.meets for m in identified(recorded, recorded.model(), **wrong))
    blind = identified(recorded, recorded.model(), **wrong, last_updates=None, optimizer=None)
    assert names(m for m in blind if m.meets) == {"pcx_ipc"} and all(m.only_output for m in blind if m.meets)


def test_a_start_is_of_the_programs_layers():
    """A flat model finds its nesting, with beliefs that start elsewhere."""
    torch.manual_seed(0)
    nested = pcfast.group_layers(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(),
        beliefs="before_activation",
    )
    x, y = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    vinit = [None, torch.randn(7, 5).double(), torch.randn(7, 6).double(), None]
    preset = pcfast.presets.pctrainer(step_size=0.1, num_steps=6)
    pcfast.pc_loss(nested, x, y, **preset, vinit=vinit).backward()
    grads = [p.grad for p in nested.parameters()]
    result = identify(flattened(nested), x, y, grads, step_size=0.1, num_steps=6, vinit=vinit)
    assert {(m.preset, m.layers) for m in result if m.meets} == {("pctrainer", "beliefs='before_activation'")}


@pytest.mark.parametrize("preset", pcfast.presets.PRESETS)
def test_the_ports_on_the_page_run(preset):
    names: dict = {}
    prelude = next(block for block in blocks_of_code(PAGE.read_text()) if "flat = " in block)
    for code in (prelude, port(preset)):
        exec(compile(code, "ports.md", "exec"), names)
    model, run = names["model"], pcfast.last_run()
    assert all(p.grad.any() for p in model.parameters())
    assert len(model) == (5 if preset == "torch2pc" else 3)
    assert run.plan.method == pcfast.presets.PRESETS[preset](step_size=0.1, num_steps=3, loss="mse").method


def test_the_table_on_the_page_is_of_these_files():
    """All but its numbers, which are rounding and depend on the processor."""
    rows = PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    of_files = Counter((r.meta["program"], r.meta["revision"], f"`{r.preset}`") for r in map(load, FILES))
    assert {tuple(row[:3]): int(row[3]) for row in cells} == of_files
    for row in cells:
        assert max(map(float, row[4:7])) < (1e-6 if "Deepity" in row[0] else 2e-12)
        assert int(row[7]) == sum(bool(line.strip()) for line in port(row[2].strip("`")).splitlines())


def test_bad_records_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = torch.rand(5, 3), torch.rand(5, 2)
    grads = [torch.ones_like(p) for p in model.parameters()]
    settings = {"step_size": 0.1, "num_steps": 3}
    for updates, error, words in (
        (grads[:2], ArgumentError, "2 tensors; needed: 4"),
        ({"0.w": grads[0]}, ArgumentError, "names of the model's parameters: 0.weight"),
        ({"0.weight": 1.0}, ArgumentTypeError, "a tensor"),
        ({"0.weight": grads[1]}, ShapeError, r"\(4, 3\)"),
        ({}, ArgumentError, "at least one"),
        ({"0.bias": torch.zeros(4)}, ArgumentError, "zeros alone"),
    ):
        with pytest.raises(error, match=words):
            identify(model, x, y, updates, **settings)
    nan = torch.full_like(x, torch.nan)
    for arguments, error, words in (
        ((model, nan, y, grads), ArgumentError, "x: got NaN"),
        (
            (model, x, y, [*grads[:-1], torch.full_like(grads[-1], torch.nan)]),
            ArgumentError,
            r"updates\['1.bias'\]",
        ),
        ((model, x[0], y[0], grads), ShapeError, "x: got shape"),
        ((model, x.T, y, grads), ShapeError, "x"),
        ((model, x, y[:, :1], grads), ShapeError, "y"),
        ((model, x.numpy(), y, grads), ArgumentTypeError, "x: got a ndarray"),
        ((model[0], x, y, grads), pcfast.ModelError, "Sequential"),
    ):
        with pytest.raises(error, match=words):
            identify(*arguments, **settings)
    labels = torch.randint(0, 2, (5,), dtype=torch.int32)  # JAX's
    assert {m.loss for m in identify(model, x, labels, grads, **settings)} >= {"cross_entropy"}
    with pytest.raises(ArgumentError, match="loss"):
        identify(model, x, y, grads, loss="ce", **settings)
    with pytest.raises(ArgumentError, match="last_updates"):
        identify(model, x, y, grads, last_updates=grads, **settings)
    with pytest.raises(ArgumentError, match="num_steps"):
        identify(model, x, y, grads, step_size=0.1, num_steps=-1)
