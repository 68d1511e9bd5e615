"""The attacks by name: the table `ATTACKS` holds all that the rest of the program needs to know about each of them.

To add an attack, write its function in `robust/attacks.py` and add one `AttackSpec` here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from atmc.core.errors import unknown
from atmc.core.rng import Noise, check_seed, derived_seed
from atmc.data import Images
from atmc.evaluation import autoattack, corner
from atmc.evaluation.fast_logits import choose_logits
from atmc.evaluation.verdicts import Verdicts, accuracy_after_stages, mean_distances
from atmc.models.factory import USER_CODE_ERRORS
from atmc.robust.attacks import PgdSettings, attack_mode, cw, fgsm, interval_pgd, wrm
from atmc.robust.intervals import bound_logits
from atmc.robust.threats import Linf, Threat, check_threat

INTERVAL_STARTS, INTERVAL_STEPS = 3, 40  # of PGD on interval bounds
LONG_SQUARES = 3  # seeds of a longer Square
QUICK_STEPS = 20  # of the PGD on the margin in `quick`
FURTHER = ("interval-pgd", "corner", "square-long")  # attacks that go beyond AutoAttack, the cheapest first

Perturber = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """One part of an attack: perturb(x, y, rows of the images in their split) -> adversarial images like x."""

    name: str
    perturb: Perturber


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an attack is built for: its name, a model on the device of the images, a threat, the user's settings."""

    attack: str
    model: nn.Module
    images: Images
    threat: Threat
    pgd: PgdSettings
    seed: int

    @torch.no_grad()
    def count_classes(self) -> int:
        """Return the number of the model's outputs."""
        with attack_mode(self.model):
            return int(self.model(self.images.float_pixels(slice(0, 2))).shape[1])


Built = tuple[list[Stage], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    """An attack as users name it.

    Args:
        help: what it does, in one line; docs/evaluation.md has it, and a test compares the two.
        build: `Setup` -> its stages, each of which attacks what the ones before left, and the settings that
            metrics.json shows.
        norms: names of the threats that it is for; None for every one.
        bounded: whether it keeps to the threat's ball; if not, its images only have to lie in [0, 1].
        minimal_norm: whether it looks for the nearest image that fools the model, which may lie outside the ball. Such
            an image does not count, but it is no fault of the attack.
        white_box: whether the checks may rely on it: it follows the model's gradients for many steps within the ball.
        gradient_free: its stages, by name, that do not follow the model's gradients; they are its last ones.
        further: its stages, by name, after those of AutoAttack; None if it does not run AutoAttack.
        takes_pgd: whether the user's settings of PGD (steps, step size, restarts, loss) change it.
        only_pgd: whether it is PGD with these settings and nothing else.
        report: what to report of its verdicts besides the accuracy: (verdicts, names of stages) -> JSON.
    """

    help: str
    build: Callable[[Setup], Built]
    norms: tuple[str, ...] | None = None
    bounded: bool = True
    minimal_norm: bool = False
    white_box: bool = True
    gradient_free: tuple[str, ...] = ()
    further: tuple[str, ...] | None = None
    takes_pgd: bool = False
    only_pgd: bool = False
    report: Callable[[Verdicts, tuple[str, ...]], dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """An attack on a model: its stages in order, and the settings that metrics.json shows; threat None: no ball."""

    attack: str
    spec: AttackSpec
    stages: list[Stage]
    settings: dict[str, Any]
    threat: Threat | None


def _build_fgsm(setup: Setup) -> Built:
    stage = Stage("fgsm", lambda x, y, _: fgsm(setup.model, x, y, setup.threat))
    return [stage], {"eps": setup.threat.eps}


def _build_wrm(setup: Setup) -> Built:
    settings = {"maximizes": "loss_weight * loss - |x' - x|^2 / 2", **_defaults(wrm)}
    return [Stage("wrm", lambda x, y, _: wrm(setup.model, x, y))], settings


def _build_cw(setup: Setup) -> Built:
    return [Stage("cw", lambda x, y, _: cw(setup.model, x, y))], {"eps": setup.threat.eps, **_defaults(cw)}


def _defaults(attack: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the defaults of a function's keyword arguments."""
    parameters = inspect.signature(attack).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def _build_pgd(setup: Setup) -> Built:
    setup, note = _replace_dlr(setup)
    settings = {"eps": setup.threat.eps, **_show_pgd(setup.pgd), "seed": setup.seed, **note}
    return _pgd_stages("pgd", setup, setup.pgd, purpose="pgd"), settings


def _build_strong_pgd(setup: Setup) -> Built:
    setup, note = _replace_dlr(setup)
    strong, first = PgdSettings.strong(setup.threat), _show_pgd(setup.pgd)
    if not setup.pgd.best_of_steps:  # the paper's, perhaps with other steps: its restarts and loss are known
        del first["restarts"], first["loss"]
    settings = {"eps": setup.threat.eps, **_show_pgd(strong), "seed": setup.seed, **note}
    stages = _pgd_stages("pgd", setup, setup.pgd, purpose="pgd")
    stages += _pgd_stages("pgd-strong", setup, strong, purpose="evaluation")
    return stages, settings | {"with": {"attack": "pgd", **first}}


def _replace_dlr(setup: Setup) -> tuple[Setup, dict[str, str]]:
    """Return the setup, with the margin in place of a DLR loss that needs more classes, and a note of that."""
    classes = setup.count_classes()
    if setup.pgd.loss != "dlr" or classes >= autoattack.DLR_CLASSES:
        return setup, {}
    return replace(setup, pgd=replace(setup.pgd, loss="margin")), {"note": autoattack.no_dlr_note(classes)}


def _pgd_stages(name: str, setup: Setup, pgd: PgdSettings, *, purpose: str) -> list[Stage]:
    """Return one stage per start."""

    def build(restart: int) -> Perturber:
        def perturb(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            random = pgd.random_start or restart > 0
            noise = Noise(index, seed=setup.seed, purpose=purpose, epoch=restart) if random else None
            return pgd.attack(setup.model, x, y, setup.threat, noise=noise)

        return perturb

    return [Stage(name, build(restart)) for restart in range(pgd.restarts)]


def _show_pgd(pgd: PgdSettings) -> dict[str, Any]:
    """Return the settings as metrics.json has them, in which random_start says whether any start is random."""
    shown = ("steps", "step_size", "random_start", "restarts", "loss")
    values = asdict(pgd) | {"random_start": pgd.random_start or pgd.restarts > 1}
    return {name: values[name] for name in shown}


def _build_quick(setup: Setup) -> Built:
    """Put a PGD on the margin and a short Square, which needs no gradient, behind the paper's PGD."""
    threat, device = setup.threat, setup.images.labels.device
    second = replace(PgdSettings.from_image(threat, QUICK_STEPS, loss="margin"), random_start=True)
    stages = _pgd_stages("pgd", setup, PgdSettings.paper(threat), purpose="pgd")
    stages += _pgd_stages("pgd-margin", setup, second, purpose=setup.attack)
    settings = {"eps": threat.eps, "steps": QUICK_STEPS, "seed": setup.seed}
    shape = tuple(setup.images.pixels.shape[1:])
    try:
        autoattack.check_fit(
            threat, [autoattack.SQUARE], attack=setup.attack, classes=setup.count_classes(), shape=shape
        )
    except ValueError as error:
        return stages, settings | {"left_out": {autoattack.SQUARE: str(error)}}
    square = autoattack.build_square(
        setup.model, setup.model, threat, queries=autoattack.QUICK_QUERIES, seed=setup.seed, device=device
    )
    stages.append(Stage(autoattack.SQUARE, lambda x, y, _: square(x, y)))
    return stages, settings | {"queries": autoattack.QUICK_QUERIES, "p": autoattack.SHARE}


def _build_interval_pgd(setup: Setup) -> Built:
    """Raise ValueError if the model cannot be bounded by intervals."""
    try:
        with attack_mode(setup.model), torch.no_grad():
            bound_logits(setup.model, setup.images.float_pixels(slice(0, 2)), setup.threat)
    except USER_CODE_ERRORS as error:
        raise ValueError(f"{setup.attack} needs interval bounds of the model: {error}") from error

    def build(restart: int) -> Perturber:
        def perturb(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            noise = Noise(index, seed=setup.seed, purpose=setup.attack, epoch=restart) if restart else None
            return interval_pgd(setup.model, x, y, setup.threat, steps=INTERVAL_STEPS, noise=noise)

        return perturb

    shown = {"steps": INTERVAL_STEPS, "random_start": True, "restarts": INTERVAL_STARTS, "seed": setup.seed}
    stages = [Stage(setup.attack, build(restart)) for restart in range(INTERVAL_STARTS)]
    return stages, {"eps": setup.threat.eps, **shown}


def _build_corner(setup: Setup) -> Built:
    logits, threat = _lazy_logits(setup), setup.threat
    assert isinstance(threat, Linf)

    def perturb(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        noise = Noise(index, seed=setup.seed, purpose=setup.attack)
        return corner.search_corners(logits(), x, y, threat, noise=noise, queries=corner.QUERIES)

    return [Stage(setup.attack, perturb)], {"eps": threat.eps, "queries": corner.QUERIES, "seed": setup.seed}


def _build_long_square(setup: Setup) -> Built:
    logits, threat, device = _lazy_logits(setup), setup.threat, setup.images.labels.device
    shape = tuple(setup.images.pixels.shape[1:])
    autoattack.check_fit(threat, [autoattack.SQUARE], attack=setup.attack, classes=setup.count_classes(), shape=shape)

    def build(restart: int) -> Perturber:
        seed = derived_seed(setup.seed, restart)

        def perturb(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            attack = autoattack.build_square(
                setup.model, logits(), threat, queries=autoattack.LONG_QUERIES, seed=seed, device=device
            )
            return attack(x, y)

        return perturb

    shown = {"queries": autoattack.LONG_QUERIES, "p": autoattack.SHARE, "restarts": LONG_SQUARES}
    stages = [Stage(setup.attack, build(restart)) for restart in range(LONG_SQUARES)]
    return stages, {"eps": threat.eps, **shown, "seed": setup.seed}


def _lazy_logits(setup: Setup) -> Callable[[], Callable[[Tensor], Tensor]]:
    """Return a function that chooses the model's logits when it is first called, since the engine takes a second."""
    return functools.cache(lambda: choose_logits(setup.model, setup.images.float_pixels(slice(0, 8))))


def _build_thorough(setup: Setup) -> Built:
    """Put the stages of AutoAttack before those of the attacks that go further, of which some may not fit the model."""
    stages, settings = ATTACKS["autoattack"].build(setup)
    further, left_out = {}, {}
    for name in FURTHER:
        try:
            check_norm(name, setup.threat)
            more, further[name] = ATTACKS[name].build(replace(setup, attack=name))
        except ValueError as error:
            left_out[name] = str(error)
        else:
            stages += more
    return stages, settings | {"further": further} | ({"left_out": left_out} if left_out else {})


def _autoattack(*parts: str, **flags: Any) -> AttackSpec:
    """Return the spec of one or more parts of AutoAttack; flags are further fields of the spec."""

    def build(setup: Setup) -> Built:
        classes, device, threat = setup.count_classes(), setup.images.labels.device, setup.threat
        shape = tuple(setup.images.pixels.shape[1:])
        autoattack.check_fit(threat, parts, attack=setup.attack, classes=classes, shape=shape)
        attacks = autoattack.build_attacks(setup.model, threat, parts, classes=classes, seed=setup.seed, device=device)
        stages = [Stage(name, lambda x, y, _, run=run: run(x, y)) for name, run in attacks.items()]  # type: ignore[misc]
        return stages, autoattack.describe_settings(threat, parts, classes=classes, seed=setup.seed)

    gradient_free = tuple(name for name in parts if autoattack.PARTS[name].gradient_free)
    return AttackSpec(build=build, gradient_free=gradient_free, **flags)


ATTACKS: dict[str, AttackSpec] = {
    "fgsm": AttackSpec(help="one step of length eps from the image", build=_build_fgsm, white_box=False),
    "pgd": AttackSpec(
        help="the paper's: 7 steps for linf below 0.1, else 16, of 1.25 eps / steps, from the image, last iterate",
        build=_build_pgd,
        takes_pgd=True,
        only_pgd=True,
    ),
    "pgd-strong": AttackSpec(
        help="`pgd`, then 5 random starts of 40 steps of eps / 10, iterate of highest loss",
        build=_build_strong_pgd,
        takes_pgd=True,
    ),
    "quick": AttackSpec(
        help="`pgd`, then 20 steps on the margin from a random start, Square with 200 queries: for choices in training",
        build=_build_quick,
        gradient_free=(autoattack.SQUARE,),
    ),
    "wrm": AttackSpec(
        help="7 steps on 1.3 times the loss minus half the squared distance, in [0, 1]; reports mean distances",
        build=_build_wrm,
        bounded=False,
        white_box=False,
        report=mean_distances,
    ),
    "cw": AttackSpec(
        help="the nearest wrong image by Adam, 9 penalties of 200 steps; counts if it is within eps",
        build=_build_cw,
        norms=("l2",),
        minimal_norm=True,
    ),
    "apgd-ce": _autoattack("apgd-ce", help="APGD on the cross-entropy, 100 steps, 1 start (l1: 5), by pyautoattack"),
    "apgd-dlr": _autoattack("apgd-dlr", help="APGD on the DLR loss, 100 steps, 1 start (l1: 5), by pyautoattack"),
    "fab": _autoattack(
        "fab", help="the nearest wrong image by FAB, 100 steps, 1 start, by pyautoattack", minimal_norm=True
    ),
    "square": _autoattack("square", help="5,000 queries, no gradient, by pyautoattack", white_box=False),
    "autoattack": _autoattack(
        *autoattack.STANDARD,
        help="APGD-CE, targeted APGD-DLR, targeted FAB and Square, in this order, by pyautoattack",
        further=(),
        report=accuracy_after_stages,
    ),
    "interval-pgd": AttackSpec(
        help="3 starts of 40 steps on interval bounds of the margin, over a ball around the iterate that shrinks to 0",
        build=_build_interval_pgd,
        white_box=False,
        gradient_free=("interval-pgd",),
    ),
    "corner": AttackSpec(
        help="20,000 queries, no gradient: flips squares of pixels between the two ends of the ball, large ones first",
        build=_build_corner,
        norms=("linf",),
        white_box=False,
        gradient_free=("corner",),
    ),
    "square-long": AttackSpec(
        help="Square with 20,000 queries and 3 seeds, by pyautoattack",
        build=_build_long_square,
        white_box=False,
        gradient_free=("square-long",),
    ),
    "thorough": AttackSpec(
        help="`autoattack`, then `interval-pgd`, `corner` (linf) and `square-long` on what is left",
        build=_build_thorough,
        gradient_free=(autoattack.SQUARE, *FURTHER),
        further=FURTHER,
        report=accuracy_after_stages,
    ),
}


def check_attacks(names: Iterable[str]) -> None:
    """Raise ValueError if an attack is not known."""
    for name in names:
        if name not in ATTACKS:
            raise unknown("attack", name, ATTACKS)


def check_norm(name: str, threat: Threat) -> None:
    """Raise ValueError if the attack does not exist for the threat's norm."""
    norms = ATTACKS[name].norms
    if norms is not None and threat.name not in norms:
        raise ValueError(f"attack {name!r} exists for {', '.join(norms)} only, the threat is {threat}")


def takes_pgd_settings(names: Iterable[str]) -> bool:
    """Return whether the user's settings of PGD change any of these attacks."""
    return any(ATTACKS[name].takes_pgd for name in names)


def build_protocol(
    model: nn.Module, images: Images, threat: Threat, attack: str, *, pgd: PgdSettings | None = None, seed: int = 0
) -> Protocol:
    """Return the stages of an attack on a model, and the settings that metrics.json shows.

    Args:
        attack: a key of `ATTACKS`.
        pgd: settings of PGD, for attacks that take them; the paper's by default.

    Raises:
        ValueError: as `robust_accuracy`.
    """
    check_attacks([attack])
    check_seed(seed)
    check_norm(attack, threat)
    check_threat(threat, images.pixels[0].numel())
    spec = ATTACKS[attack]
    pgd = pgd or PgdSettings.paper(threat)
    setup = Setup(attack=attack, model=model, images=images, threat=threat, pgd=pgd, seed=seed)
    stages, settings = spec.build(setup)
    return Protocol(attack=attack, spec=spec, stages=stages, settings=settings, threat=threat if spec.bounded else None)
