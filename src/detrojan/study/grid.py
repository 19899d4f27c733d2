"""From axes to models to shards, with filters."""

import itertools
from collections.abc import Iterator

from detrojan import registry
from detrojan.cells import NO_METHOD, NO_SAMPLES, ONE_DRAW, Model, Shard, untouched
from detrojan.study import trials
from detrojan.study.schema import Axis, Grid, Study, has


def models(study: Study) -> list[Model]:
    """Return the models of the study: attacked ones that pass the filters, and the clean one beside them.

    A clean model is the control of the attacked ones of its data set, architecture and seed, so it
    stays whenever one of those does; a study without attacks has clean models only.
    """
    grid, found = study.grid, []
    attacks = [attack for attack in grid.attacks if attack != NO_METHOD]
    for dataset, architecture, seed in itertools.product(grid.datasets, grid.architectures, grid.seeds):
        clean = Model(dataset, architecture, NO_METHOD, 0.0, seed)
        attacked = [
            model
            for attack, ratio in itertools.product(attacks, grid.ratios)
            if _planned(grid, (model := clean._replace(attack=attack, ratio=ratio))._asdict())
        ]
        if attacked or (not attacks and _planned(grid, clean._asdict())):
            found += [clean, *attacked]
    return found


def shards(study: Study) -> Iterator[Shard]:
    """Yield the shards of the study; the untouched model comes first among those of each model."""
    grid = study.grid
    defenses = [defense for defense in grid.defenses if defense != NO_METHOD]
    with_data = [(spc, grid.draws) for spc in grid.spc]
    without = [(NO_SAMPLES, [ONE_DRAW])]
    for model in models(study):
        yield untouched(model)
        for defense in defenses:
            data_free = registry.threat_model("defenses", defense) == "data_free"
            declared = [protocol for protocol in grid.protocols if has(defense, protocol)]
            for protocol, (spc, ranges) in itertools.product(declared, without if data_free else with_data):
                own = {"defense": defense, "protocol": protocol, "spc": spc}
                if _planned(grid, model._asdict() | own):
                    yield from (Shard(model, defense, spc, draws, protocol) for draws in ranges)


def undeclared(study: Study) -> list[str]:
    """Return which defenses have no cells under a protocol that the study names, a sentence a protocol.

    Trials are declared together or not at all, and so are said together.
    """
    lines = []
    for protocol in study.grid.protocols:
        names = [name for name in study.grid.defenses if name != NO_METHOD and not has(name, protocol)]
        if not names:
            continue
        if protocol == trials.TUNED or trials.number(protocol) is not None:
            said = f"No trials and nothing tuned: no search in config/defenses/ for {', '.join(names)}."
        else:
            said = f"No cells under protocol {protocol}, which they don't declare: {', '.join(names)}."
        lines.append(said)
    return list(dict.fromkeys(lines))


def _planned(grid: Grid, axes: dict[str, Axis]) -> bool:
    """Return whether the filters let through what ``axes`` name.

    To be included, no more is asked of ``axes`` than they have: a whole model, named without defense
    and SPC, is included for the sake of a part; a clean model, as the control of every attack and
    ratio; a data-free method, whatever the SPC. To be excluded, they must meet a filter in full.
    """
    clean = axes["attack"] == NO_METHOD
    asked = {axis: value for axis, value in axes.items() if not (clean and axis == "attack")}
    included = not grid.include or any(f.matches(asked, partial=True) for f in grid.include)
    return included and not any(f.matches(axes) for f in grid.exclude)
