"""View of a project in Weights & Biases: `python -m ivtp.report.wandb_view ENTITY/PROJECT`."""

from importlib import import_module

from ivtp.data.scenes2 import FAMILIES
from ivtp.registry import UserError
from ivtp.report.wandb import logged_in


def workspace(entity: str, project: str, experiment: str | None = None):
    """Make the view, without saving it: nothing is sent."""
    try:
        wr, ws = (import_module(f"wandb_workspaces.{name}") for name in ("reports.v2", "workspaces"))
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
        bars("hit_rate", "hit rate of the target patches"),
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
    """Save the view and return its address."""
    import requests
    import wandb

    if not logged_in():
        raise UserError("not logged in to Weights & Biases; run `wandb login` first")
    try:
        return view.save().url
    except (wandb.Error, requests.RequestException, ValueError) as error:
        raise UserError(f"the view could not be saved to {view.entity}/{view.project}: {error}") from error


if __name__ == "__main__":
    from ivtp.cli.wandb_view import main

    raise SystemExit(main())
