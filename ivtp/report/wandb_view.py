"""`python -m ivtp.report.wandb_view ENTITY/PROJECT`: save the view of the runs in Weights & Biases.

Runs are grouped by experiment, then by row; accuracy against cost, a bar per row and family, what flipped, tables with
pictures of the kept tokens. `--experiment NAME` shows one experiment alone. Needs `pip install 'ivtp[workspaces]'` and
a login (`wandb login`); run once per project, runs that come later appear in it by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.command import command
from ivtp.data.scenes2 import FAMILIES
from ivtp.registry import UserError
from ivtp.report.wandb_run import logged_in


def main(arguments: Sequence[str] | None = None) -> int:
    return command(arguments, lambda: __doc__, lambda given: print(save(workspace(*parse(given)))))


def parse(arguments: Sequence[str]) -> tuple[str, str, str | None]:
    """Entity, project, experiment."""
    rest, experiment = list(arguments), None
    if "--experiment" in rest:
        place = rest.index("--experiment")
        experiment = next(iter(rest[place + 1 : place + 2]), None)
        del rest[place : place + 2]
        if not experiment:
            raise UserError("--experiment needs the name of an experiment, as in: --experiment table1")
    parts = rest[0].split("/") if len(rest) == 1 else []
    if len(parts) != 2 or not all(parts):
        raise UserError(f"{' '.join(rest)!r} is not of the form ENTITY/PROJECT, as in: my-team/ivtp")
    return parts[0], parts[1], experiment


def workspace(entity: str, project: str, experiment: str | None = None):
    """The view, not saved yet: nothing is sent."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("the saved view needs wandb-workspaces: pip install 'ivtp[workspaces]'") from error

    def bars(metric: str, title: str):
        return wr.BarPlot(title=title, metrics=[metric], max_bars_to_show=60, layout=wr.Layout(w=8, h=8))

    def scatter(x: str, y: str, title: str):
        axes = (wr.SummaryMetric(name) for name in (x, y))
        return wr.ScatterPlot(
            title=title, x=next(axes), y=next(axes), legend_template="${run:displayName}", layout=wr.Layout(w=12, h=10)
        )

    points = [
        scatter("tflops/total", "accuracy", "accuracy against TFLOPs"),
        scatter("average_tokens", "accuracy", "accuracy against average visual tokens"),
    ]
    families = [bars("accuracy", "all questions"), *(bars(f"accuracy/{family}", family) for family in FAMILIES)]
    against = [
        bars("unpruned/difference", "accuracy − unpruned, same questions"),
        bars("unpruned/agreement", "same answer as unpruned"),
        bars("hit", "a kept token lies on what is asked about"),
    ]
    wide = wr.Layout(w=24, h=12)
    tables = [wr.WeavePanelSummaryTable(table_name=name, layout=wide) for name in ("samples", "flips")]
    tables.append(wr.MediaBrowser(title="kept tokens", media_keys=["kept_tokens"], num_columns=6, layout=wide))
    sections = {
        "Accuracy and cost": points,
        "Families of questions": families,
        "Against the unpruned model": against,
        "Samples and flips": tables,
    }
    columns = ("accuracy", "tflops/total", "tokens", "unpruned/difference", "unpruned/p", "unpruned/agreement")
    return ws.Workspace(
        name=f"ivtp: {experiment or 'all experiments'}",
        entity=entity,
        project=project,
        auto_generate_panels=False,
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            # Panels show one mark per innermost group: a row of the table, its seeds as one.
            groupby=[ws.Metric("Group"), ws.Metric("Name")],
            filters=[ws.Metric("Group") == experiment] if experiment else [],
            order=[ws.Ordering(ws.Summary("tflops/total"), ascending=True)],
            pinned_columns=[f"summary:{name}" for name in columns],
        ),
    )


def save(view) -> str:
    """Save the view; its address."""
    import requests
    import wandb

    if not logged_in():
        raise UserError("not logged in to Weights & Biases; run `wandb login` first")
    try:
        return view.save().url
    except (wandb.Error, requests.RequestException, ValueError) as error:
        raise UserError(f"the view could not be saved to {view.entity}/{view.project}: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
