"""The table of all objectives by name: the decorator that registers one, the loader that checks parameters.

The defaults of rcpo's own objectives stand in conf/objective/NAME.yaml, once; a user's own has them in its
config.
Does not own any formula: those are in the family files beside it, and in users' own modules
(`rcpo.objectives.own`). Called by `rcpo.objectives.composition` for what a config asks for."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rcpo.common.conf import value_in_conf
from rcpo.common.errors import UserError
from rcpo.common.installed import OBJECTIVES, load_from, names_in
from rcpo.objectives.loss import BatchStatistic, LossFunction, Match, Objective
from rcpo.objectives.parameters import ParameterError, check_kind, config_key
from rcpo.objectives.trial import try_out

TOP = "objective"
"""The config section that holds an objective; terms of a mix live at objective.terms[i]."""


@dataclass(frozen=True)
class Entry:
    """One line of the registry."""

    loss: LossFunction
    config_type: type
    needs_reference: bool | Callable[[Any], bool]
    """A function of the config where the parameters decide (mix)."""
    statistics: tuple[BatchStatistic, ...] | Callable[[Any], tuple[BatchStatistic, ...]]
    weighs_tokens: bool = False
    match: Match | None = None
    listwise: bool | Callable[[Any], bool] = False

    def defaults(self, name: str) -> dict[str, Any]:
        """Value of every parameter by its key. Raises UserError where conf/objective/NAME.yaml lacks one."""
        fields = dataclasses.fields(self.config_type)
        if REGISTRY.get(name) is not self:
            config = self.config_type()
            return {config_key(field.name): getattr(config, field.name) for field in fields}
        keys = [config_key(field.name) for field in fields]
        return {key: value_in_conf((f"{TOP}/{name}",), key) for key in keys}

    def build(self, name: str, config: Any) -> Objective:
        needs, statistics, listwise = self.needs_reference, self.statistics, self.listwise
        return Objective(
            name,
            self.loss,
            config,
            needs if isinstance(needs, bool) else needs(config),
            statistics if isinstance(statistics, tuple) else statistics(config),
            self.weighs_tokens,
            listwise=listwise if isinstance(listwise, bool) else listwise(config),
            match=self.match,
        )


REGISTRY: dict[str, Entry] = {}
"""The objectives that rcpo ships."""
OWN: dict[str, Entry] = {}
"""Objectives of users' own, registered in this process; a name registered again is replaced, as a cell of a
notebook that runs again does."""


@dataclass(frozen=True)
class NoParameters:
    """The config of an objective that has none."""


def objective(
    name: str,
    config_type: type = NoParameters,
    *,
    needs_reference: bool | Callable[[Any], bool],
    statistics: tuple[BatchStatistic, ...] | Callable[[Any], tuple[BatchStatistic, ...]] = (),
    weighs_tokens: bool = False,
    match: Match | None = None,
    listwise: bool | Callable[[Any], bool] = False,
) -> Callable[[LossFunction], LossFunction]:
    """Register a loss function under `name`, which is also its name in a config: objective=NAME.

        @rcpo.objectives.register("my_loss", MyConfig, needs_reference=True)
        def my_loss(pair: PairLogProbs, config: MyConfig) -> Tensor:
            return -F.logsigmoid(config.beta * pair.margin())   # one number a pair, (B,)

    `config_type` is a frozen dataclass whose fields, all with defaults, are the parameters; those of rcpo's
    own objectives have their defaults in conf/objective/NAME.yaml instead. Public as
    `rcpo.objectives.register`. Raises ValueError for a name that rcpo's own objectives have.
    """

    def register(loss: LossFunction) -> LossFunction:
        is_own = not loss.__module__.startswith(f"{__package__}.")
        if name in REGISTRY:
            fault = "is one of rcpo's; choose another name" if is_own else "is registered twice"
            raise ValueError(f"objective {name!r} {fault}")
        if is_own:
            _check_config_type(name, config_type)
        table = OWN if is_own else REGISTRY
        table[name] = Entry(loss, config_type, needs_reference, statistics, weighs_tokens, match, listwise)
        return loss

    return register


def _check_config_type(name: str, config_type: type) -> None:
    """Raise TypeError where the parameters of a config could not be read or be left out."""
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    if not dataclasses.is_dataclass(config_type) or any(
        (field.default, field.default_factory) == missing for field in dataclasses.fields(config_type)
    ):
        raise TypeError(f"objective {name!r}: its config must be a dataclass whose fields all have defaults")


def objective_names() -> list[str]:
    """Every name that can be asked for: rcpo's own, those registered in this process, and those of installed
    packages, which are not imported for it."""
    return sorted({*REGISTRY, *OWN, *names_in(OBJECTIVES)})


def _entry_at(path: str, name: str) -> Entry:
    """The entry of that name. Raises UserError where there is none, or its package cannot be imported."""
    if name in REGISTRY:
        return REGISTRY[name]
    key = path if path == TOP else f"{path}.name"
    if name not in OWN:
        try:
            is_installed = load_from(OBJECTIVES, name)
        # Somebody else's module: anything can go wrong in it.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{key}={name}: the package that has it cannot be imported ({reason}); mend or remove it"
            ) from None
        if is_installed and name not in OWN:
            raise UserError(
                f"{key}={name}: the entry point of that name registers no such objective; tell its package's "
                "authors"
            )
    if name not in OWN:
        raise UserError(f"{key}={name}: no such objective; choose one of {', '.join(objective_names())}")
    return OWN[name]


def load_objective(name: str, **params: Any) -> Objective:
    """Return the objective `name` with `params` over its defaults.

    Raises UserError for an unknown name, an unknown parameter, a value of the wrong kind or one outside its
    range.
    """
    return load_at(TOP, name, params)


def load_at(path: str, name: str, params: dict[str, Any], also: tuple[str, ...] = ()) -> Objective:
    """`load_objective` for any section; error messages begin with `path`, and hint at keys in `also` too."""
    entry = _entry_at(path, name)
    fields = {config_key(field.name): field.name for field in dataclasses.fields(entry.config_type)}
    defaults = entry.defaults(name)
    for key, value in params.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), [*fields, *also], n=1)
            hint = f"did you mean {path}.{close[0]}?" if close else f"it has {', '.join(fields) or 'none'}"
            raise UserError(f"{path}.{key}={value}: {name} has no such parameter; {hint}")
    try:
        for key, value in params.items():
            check_kind(key, value, defaults[key])
        config = entry.config_type(**{fields[key]: value for key, value in (defaults | params).items()})
    except ParameterError as error:
        raise UserError(one_line(path, error, defaults)) from None
    except ValueError as error:  # a user's own check
        raise UserError(f"{path}={name}: refuses its parameters ({error}); give others") from None
    built = entry.build(name, config)
    if name in OWN:
        try_out(built)
    return built


def one_line(path: str, error: ParameterError, defaults: Mapping[str, Any]) -> str:
    """Value, rule and what to type, for a parameter of the section at `path`."""
    example = str(defaults.get(error.key) if error.example is None else error.example).lower()
    # The command line sets a list whole, so a term's value is mended where the list is written.
    cure = f"type {path}.{error.key}={example}"
    if path != TOP:
        cure = f"write {error.key}: {example} in that term"
    return f"{path}.{error.key}={error.value}: must be {error.rule}; {cure}"
