"""The command ``detrojan``: what one types, and where it leads.

What a command does is in the module of its name in :mod:`detrojan.commands`. It is imported when the
command runs, and no sooner: help and completion come at once.
"""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from detrojan import __version__

RESULTS = "results"  # as the graph of jobs says, which takes longer to import than a help text to print
SHORTEST_WATCH = 2.0  # seconds
PATH = click.Path(path_type=Path)
GRAMMAR = """

KEY is an axis of a cell: dataset, architecture, attack, ratio, seed, defense, spc or draw. VALUE is one
value (attack=badnets), several (defense=ft,fp), a range of whole numbers (draw=0-4) or a comparison, in
quotes for the shell (spc=">=10"). All conditions must be met.
"""


def examples(*lines: str) -> str:
    """Return the end of a help text that shows command lines as they are typed."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


# --- what several commands take --------------------------------------------------------------------

conditions = click.argument("texts", nargs=-1, metavar="[KEY=VALUE]...")
results = click.option(
    "--results", type=PATH, default=RESULTS, show_default=True, help="The study's folder of results."
)


def configfile(otherwise: str) -> Callable[[Any], Any]:
    """Return the option that names study files; ``otherwise`` is read if it is not given."""
    text = f"A study file; repeat it to merge several, of which later ones win. If not given: {otherwise}."
    return click.option("--configfile", "configfiles", type=PATH, multiple=True, metavar="FILE", help=text)


def _table() -> Path:
    from detrojan.workflow.job_costs import TABLE

    return TABLE


table = click.option(
    "--table", type=PATH, default=_table, help="The table of costs; slurm/costs.csv if not given."
)


def _counts(ctx: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """Return the whole numbers that ``text`` lists."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r} should be whole numbers, at least 1, with commas between")
    return [int(part) for part in parts]


def _seldom(ctx: click.Context, parameter: click.Parameter, seconds: float | None) -> float | None:
    """Return ``seconds``, if that is not too often."""
    if seconds is not None and not seconds >= SHORTEST_WATCH:
        raise click.BadParameter(
            f"at least {SHORTEST_WATCH:g} seconds: all files and SLURM are asked again each time"
        )
    return seconds


# --- the command -----------------------------------------------------------------------------------


class _Commands(click.Group):
    """Subcommands in the order in which one meets them; wrong input ends them without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which they are declared."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            click.echo(f"detrojan: {error}", err=True)
            ctx.exit(1)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("detrojan plan --configfile config/survey.yaml", "detrojan show", "detrojan why --help"),
)
@click.version_option(__version__)
def detrojan() -> None:
    """Measure how well backdoor mitigation repairs image classifiers.

    Snakemake runs a study; these commands tell of it before, while and after it runs. They end with 0, with
    1 and a line that says what is wrong, or with 2 if they were not understood.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that ``arguments`` name, those of the process if None, and end with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log may know no ±
    detrojan(args=arguments, prog_name="detrojan")


# --- before and while a study runs -----------------------------------------------------------------


@detrojan.command(epilog=examples("detrojan data", "detrojan data --configfile my-study.yaml"))
@configfile("config/config.yaml")
@click.pass_context
def data(ctx: click.Context, configfiles: Sequence[Path]) -> None:
    """Say what a study's data sets hold, before any job.

    That is classes and their numbers, images, sizes, repeats, what is left out. It reads all images, as the
    first job does, and ends with 1 if that job would fail.
    """
    from detrojan.commands import data

    ctx.exit(0 if data.main(configfiles) else 1)


@detrojan.command(
    epilog=examples(
        "detrojan plan",
        "detrojan plan --configfile config/survey.yaml --configfile my-changes.yaml --gpus 4,16",
    )
)
@configfile("config/config.yaml")
@click.option(
    "--gpus",
    default="8,64,512",
    show_default=True,
    callback=_counts,
    metavar="N,N",
    help="How many are free for the study.",
)
@click.option(
    "--by",
    default="",
    metavar="KEY,KEY",
    help="List the hours of all shards by these: method, dataset, architecture, spc. If not given: the "
    "largest by method and data set.",
)
@table
def plan(configfiles: Sequence[Path], gpus: Sequence[int], by: str, table: Path) -> None:
    """Say what a study will take: jobs, hours, days, files and disk.

    All follows from the study file and the costs of jobs, so it needs no data and takes seconds. Hours are
    given as one should expect them, and at most.
    """
    from detrojan.commands import plan

    plan.main(configfiles, gpus, table, [part.strip() for part in by.split(",") if part.strip()])


@detrojan.command(
    epilog=examples("detrojan rounds", "detrojan rounds --configfile config/survey.yaml --measure asr --all")
)
@configfile("config/config.yaml")
@results
@table
@click.option(
    "--measure",
    type=click.Choice(["der", "asr", "acc", "ra"]),
    default="der",
    show_default=True,
    help="By which defenses are compared.",
)
@click.option("--all", "every", is_flag=True, help="Name all pairs that are undecided.")
def rounds(configfiles: Sequence[Path], results: Path, table: Path, measure: str, *, every: bool) -> None:
    """Split a study into rounds, and say after each which defenses it can't tell apart yet.

    A round is a whole smaller study: the first seeds and ranges of draws. It says what each costs, the
    command that runs the next, and which pairs are told apart, tied or undecided after those that are done.
    """
    from detrojan.commands import rounds

    rounds.main(configfiles, results, table, measure, every=every)


@detrojan.command(epilog=examples("detrojan status", "detrojan status --watch 30"))
@results
@click.option(
    "--watch",
    type=float,
    metavar="SECONDS",
    callback=_seldom,
    help="Look again so often, until the study is done.",
)
def status(results: Path, watch: float | None) -> None:
    """Show how far a study is.

    It reads files, and asks SLURM about the jobs that should be there; what runs isn't touched. A job
    counts as done when its file is there. Whether a change makes Snakemake run it again, only a dry run
    tells.
    """
    from detrojan.commands import status

    status.main(results, watch)


@detrojan.command(
    epilog=examples(
        "snakemake --profile slurm -R $(detrojan select attack=badnets defense=ft,fp)",
        'detrojan select spc=">=10" draw=0-4 --stage evaluate',
        "detrojan select --failed",
    )
    + GRAMMAR
)
@conditions
@results
@configfile("the study that was run last")
@click.option(
    "--stage",
    type=click.Choice(["defend", "evaluate", "train"]),
    default="defend",
    help="Print what is defended (the default; for untouched models, their metrics), the metrics, or the "
    "cards of the models.",
)
@click.option("--missing", is_flag=True, help="Only where no metrics, or no card, are there.")
@click.option("--failed", is_flag=True, help="Only what died at its last attempt.")
def select(
    texts: Sequence[str],
    results: Path,
    configfiles: Sequence[Path],
    stage: str,
    *,
    missing: bool,
    failed: bool,
) -> None:
    """Name a part of a study for Snakemake.

    It prints the paths of the artifacts of the cells that meet all conditions. A job makes a range of
    draws: draw=3 means the shards that hold draw 3.
    """
    from detrojan.commands import select

    select.main(texts, results, configfiles, stage, missing=missing, failed=failed)


@detrojan.group(
    epilog=examples("detrojan costs show defense=anp dataset=gtsrb spc=10", "detrojan costs learn results")
)
def costs() -> None:
    """Show what jobs cost, and learn it from finished studies.

    The table slurm/costs.csv has seconds, memory and disk that were measured; the rest goes by a formula, see
    docs/scale.md.
    """


@costs.command(
    "show",
    epilog=examples(
        "detrojan costs show defense=anp dataset=gtsrb architecture=preactresnet18 spc=10",
        "detrojan costs show attack=wanet defense=ft draw=0-4",
    ),
)
@conditions
@table
def costs_show(texts: Sequence[str], table: Path) -> None:
    """Show what the jobs of a cell take.

    KEY is an axis of the cell, such as spc=10. Several draws are given as a range, such as draw=0-4; it is
    0-9 if not given.
    """
    from detrojan.commands import costs

    click.echo("\n".join(costs.show(texts, table)))


@costs.command(
    "learn",
    epilog=examples("detrojan costs learn", "detrojan costs learn one/results gpu.csv --device A100"),
)
@click.argument("sources", nargs=-1, type=PATH, metavar="[FOLDER|FILE]...")
@click.option("--device", default="", help="Part of a device's name: only runs on it count.")
@table
def costs_learn(sources: Sequence[Path], device: str, table: Path) -> None:
    """Replace assumptions by what finished studies took.

    It learns from folders of results, and from tables of rows that were measured elsewhere (.csv); from the
    folder results if none is named.
    """
    from detrojan.commands import costs

    click.echo("\n".join(costs.learn(sources or [Path(RESULTS)], table, device)))


# --- what it has found -----------------------------------------------------------------------------


@detrojan.command(epilog=examples("detrojan show", "detrojan show --results merged"))
@results
def show(results: Path) -> None:
    """Show the results of a study in the terminal."""
    from detrojan.commands import show

    show.main(results)


@detrojan.command(
    epilog=examples(
        "detrojan why attack=badnets defense=ft spc=10 draw=0",
        "detrojan why attack=badnets ratio=0.1",
        "detrojan why dataset=digits",
        "detrojan why results/poisoned/digits/badnets/ratio-0.1/seed-0/train.parquet --json",
    )
)
@click.argument("what", nargs=-1, required=True, metavar="WHAT...")
@results
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def why(what: Sequence[str], results: Path, *, as_json: bool) -> None:
    """Say why a result is what it is.

    WHAT is a path below the results, or KEY=VALUE texts that name one cell; without defense=..., one model;
    with dataset=... alone, a data set.

    It follows the workflow from there back to the data set, and tells of each step what is known: settings,
    code, random streams, files, logs, attempts that died.
    """
    from detrojan.commands import why

    why.main(what, results, as_json=as_json)


class _Passing(click.Command):
    """A command that hands what follows ``--`` on to another program, as the context's object."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments before ``--``, and keep those behind it."""
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


@detrojan.command(
    cls=_Passing,
    epilog=examples(
        "detrojan reproduce attack=badnets defense=ft spc=10 draw=0",
        "detrojan reproduce attack=badnets defense=ft spc=10 draw=0 -- --profile slurm",
    ),
)
@click.argument("texts", nargs=-1, required=True, metavar="KEY=VALUE... [-- OPTIONS OF SNAKEMAKE]")
@results
@click.option(
    "--into", default="reproduced", show_default=True, type=PATH, help="The folder to recompute it in."
)
@click.option(
    "--tolerance",
    type=float,
    help="Largest difference of ACC, ASR and RA; otherwise 0, or 0.02 if the device or the versions differ.",
)
@click.pass_context
def reproduce(
    ctx: click.Context, texts: Sequence[str], results: Path, into: Path, tolerance: float | None
) -> None:
    """Recompute one number from scratch and compare it.

    The cell's data set, poisoning, training, defense and evaluation run again in a folder of their own,
    by the same workflow. KEY is an axis of the cell: give as many as name one. The exit code is 0 if the
    study's row was reproduced.
    """
    from detrojan.commands import reproduce

    if not reproduce.main(texts, results, into, tolerance, ctx.obj):
        ctx.exit(1)


def _list_measures(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Print the measures and end, if ``asked``."""
    if asked and not ctx.resilient_parsing:
        from detrojan.commands import measure

        click.echo("\n".join(measure.listed()))
        ctx.exit()


@detrojan.command(
    epilog=examples(
        "detrojan measure",
        "detrojan measure attack=badnets spc=2,10 --only agreement,worst_source_asr --into badnets.parquet",
    )
    + GRAMMAR
)
@conditions
@click.option("--only", default="", metavar="NAMES", help="Measures, with commas between; else all.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_measures,
    help="Print the measures, and what each is, and end.",
)
@results
@click.option("--into", type=PATH, metavar="FILE", help="Instead of tables/measures.parquet.")
def measure(texts: Sequence[str], only: str, results: Path, into: Path | None) -> None:
    """Measure a study anew from its predicted classes.

    It writes tables/measures.parquet, needs neither GPU nor weights, and leaves the rest of the study
    alone. With conditions such as attack=badnets spc=10, only the cells that meet all of them are measured.
    """
    from detrojan.commands import measure

    measure.main(texts, [name for name in only.split(",") if name], results, into)


@detrojan.command(
    epilog=examples(
        "detrojan merge here/results there/results --into merged",
        "detrojan merge here/results there/results --into merged --prefer here/results",
    )
)
@click.argument("sites", nargs=-1, required=True, type=PATH, metavar="SITE...")
@click.option("--into", required=True, type=PATH, metavar="FOLDER", help="Where to write tables/.")
@click.option("--prefer", type=PATH, metavar="SITE", help="The site whose rows win.")
def merge(sites: Sequence[Path], into: Path, prefer: Path | None) -> None:
    """Merge the tables of sites that ran slices of one study.

    SITE is a site's folder of results. A row that two sites have must be the same in both, what it took and
    where it ran aside. Whether an attack took is decided anew, since a site may lack the clean model that
    it is measured against.
    """
    from detrojan.commands import merge

    merge.main(sites, into, prefer)


@detrojan.command(epilog=examples("detrojan tables --results merged"))
@results
@click.option(
    "--page", type=PATH, metavar="FILE", help="Only write the columns of the tables into docs/tables.md."
)
def tables(results: Path, page: Path | None) -> None:
    """Make the other tables and the report from cells and models.

    The folder holds tables/cells.parquet and tables/models.parquet, such as copies from a cluster or what
    detrojan merge has made. From these alone come all other tables and the report, without the sheets of
    triggers, which need images. Copy study.yaml along, and the page names the gate and has commands for
    each cell.
    """
    from detrojan.commands import tables

    if page:
        tables.explain(page)
    else:
        tables.main(results)


@detrojan.command(
    epilog=examples(
        "detrojan compare leaderboard.csv --mapping config/external/backdoorbench.yaml",
        "detrojan compare theirs.csv --mapping my-mapping.yaml --results results",
    )
)
@click.argument("table", type=PATH)
@click.option("--mapping", type=PATH, required=True, metavar="FILE", help="From its columns to ours, YAML.")
@click.option("--results", type=PATH, help="A study of ours to compare with, such as results.")
@click.option(
    "--into",
    type=PATH,
    metavar="FOLDER",
    help="Where to write; compare/ and the mapping's name if not given.",
)
def compare(table: Path, mapping: Path, results: Path | None, into: Path | None) -> None:
    """Set other people's results beside ours.

    TABLE has their results: .csv, .tsv or .parquet. They go through our analysis, and get the same tables
    and the same page as a study of ours. With --results there is a parity table too, which sets theirs
    beside ours and says how the settings differ.

    docs/compare.md explains the mapping. A mistake in it, or in the table, ends the command before it
    writes.
    """
    from detrojan.commands import compare

    compare.main(table, mapping, results, into)


@detrojan.command(
    epilog=examples(
        "detrojan tune --results results --out my-choices.json",
        "detrojan tune --results on-one-machine/results --results on-another/results --out my-choices.json",
    )
)
@click.option(
    "--results",
    "folders",
    type=PATH,
    multiple=True,
    default=[RESULTS],
    show_default=True,
    help="A folder of results of trials; repeat it for several.",
)
@click.option(
    "--trials", "num_trials", type=click.IntRange(1, 24), default=24, help="Only the first so many count."
)
@click.option("--out", type=PATH, required=True, metavar="FILE", help="The file to write, in JSON.")
def tune(folders: Sequence[Path], num_trials: int, out: Path) -> None:
    """Choose settings by finished trials.

    The studies have protocols: [trials] in their grid. For each defense, data set and SPC, FILE has the
    trial that was best on attacks of other families than those that it is for, its settings, and what every
    trial was worth. A study that names FILE with the key tuned may run protocols: [tuned].

    docs/tuning.md says who may see what.
    """
    from detrojan.commands import tune

    click.echo("\n".join(tune.main(folders, num_trials, out)))


@detrojan.command(
    epilog=examples(
        "detrojan inspect attack_result.pt",
        "detrojan inspect checkpoint.pth --key state_dict_ema",
        "detrojan inspect vit_tiny/model.safetensors",
    )
)
@click.argument("file", type=PATH)
@click.option("--key", metavar="KEY", help="Where in the file the state dict is; else it is looked for.")
def inspect(file: Path, key: str | None) -> None:
    """Say what a checkpoint holds that somebody else wrote.

    FILE is one of torch (.pt, .pth, TorchScript, .pt2), a safetensors file, or a folder that has
    model.safetensors. Nothing in it is run: it is safe to look at a file that you do not trust. Where a
    file would run something if torch.load loaded it, the command says so and ends with 1.
    """
    from detrojan.commands import inspect

    inspect.main(file, key)


# --- for contributors ------------------------------------------------------------------------------


@detrojan.command(
    cls=_Passing,
    epilog=examples(
        "detrojan prove",
        "detrojan prove --against v0.1.0 --configfile config/attacks.yaml",
        "detrojan prove -- --profile slurm",
    ),
)
@configfile("config/smoke.yaml, which runs every attack and every defense")
@click.option(
    "--against",
    "revision",
    metavar="REVISION",
    help="The git revision of the old code. If not given: HEAD if code was edited since, else its parent.",
)
@click.option(
    "--into",
    default="proof",
    show_default=True,
    type=PATH,
    help="A new folder to run the study in; it is deleted if nothing differs.",
)
@click.argument("nothing", nargs=-1, metavar="[-- OPTIONS OF SNAKEMAKE]")
@click.pass_context
def prove(
    ctx: click.Context, configfiles: Sequence[Path], revision: str | None, into: Path, nothing: Sequence[str]
) -> None:
    """Prove that today's code gives the numbers of an older one.

    For a refactoring that should change no number: the study runs with both codes, and every table, tensor
    and card that they leave is compared, bit for bit. If nothing differs, config/equal_code.csv records it,
    rule by rule and method by method, and results of the old code are not made again. If anything does, it
    says what, records nothing and ends with 1.
    """
    from detrojan.commands import prove

    if nothing:
        raise click.UsageError(f"unexpected argument {nothing[0]!r}; options of Snakemake follow after --")
    prove.main(configfiles, revision, into, ctx.obj)


@detrojan.group(epilog=examples("detrojan new defense bold_tuning --threat-model clean_data"))
def new() -> None:
    """Start a new method, table or figure.

    NAME is in lower case, as my_method: it stands in study files and paths. What is written runs as it
    stands and keeps the contract; each place to change is marked.
    """


_NAME = click.argument("name")
_YES = click.option("--yes", is_flag=True, help="Write, wherever the package lies, and don't ask.")


@new.command(epilog=examples("detrojan new defense bold_tuning --threat-model clean_data"))
@_NAME
@click.option(
    "--threat-model",
    required=True,
    type=click.Choice(["data_free", "clean_data", "known_trigger"]),
    help="What it is given: nothing but the model, clean images, or triggered copies of these too.",
)
@_YES
def defense(name: str, threat_model: str, yes: bool) -> None:
    """Start a method that repairs a model."""
    _begin("defense", name, threat_model, yes)


@new.command(epilog=examples("detrojan new attack frame --threat-model data_poisoning"))
@_NAME
@click.option(
    "--threat-model",
    required=True,
    type=click.Choice(["data_poisoning", "training_control"]),
    help="What is in its hands: some of the training images, or the training itself.",
)
@_YES
def attack(name: str, threat_model: str, yes: bool) -> None:
    """Start a method that backdoors a model."""
    _begin("attack", name, threat_model, yes)


@new.command(epilog=examples("detrojan new architecture wide_lenet"))
@_NAME
@_YES
def architecture(name: str, yes: bool) -> None:
    """Start a network."""
    _begin("architecture", name, "", yes)


@new.command(epilog=examples("detrojan new source numpy_file"))
@_NAME
@_YES
def source(name: str, yes: bool) -> None:
    """Start a source of images."""
    _begin("source", name, "", yes)


@new.command("table", epilog=examples("detrojan new table longest_times"))
@_NAME
@_YES
def new_table(name: str, yes: bool) -> None:
    """Start a table that follows from cells and models, and its test."""
    _begin("table", name, "", yes)


@new.command(epilog=examples("detrojan new figure times"))
@_NAME
@_YES
def figure(name: str, yes: bool) -> None:
    """Start a figure of the report, and its test."""
    _begin("figure", name, "", yes)


def _begin(kind: str, name: str, threat_model: str, yes: bool) -> None:
    from detrojan.commands import new

    new.main(kind, name, threat_model, yes=yes)


@detrojan.command(epilog=examples("detrojan schema > config/schema.json"))
def schema() -> None:
    """Print the JSON schema of study files.

    It has the fields of all methods. Editors that read it complete and check a study file whose first line
    names it, as those in config/ do.
    """
    from detrojan.study import json_schema

    click.echo(json_schema.text(), nl=False)
