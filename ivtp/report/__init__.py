"""Reports: table, figures, page and W&B runs, all drawn from results and outcomes on disk."""

from pathlib import Path

from ivtp import results as store
from ivtp.data.failures import answered, failures
from ivtp.evaluation.statistics import commonest, compare
from ivtp.report import claims, others, overlap
from ivtp.report.claims import together, verdicts_on
from ivtp.report.console import print_table
from ivtp.report.page import Report, write_page
from ivtp.report.plots import accuracy_cost, kept_tokens, save_spec
from ivtp.report.tables import main_table, markdown
from ivtp.results import Result


def report(folder: Path, results: list[Result], console, about: dict, data=None, image_processor=None) -> None:
    """Print the table, and write it with figures and page into `folder`.

    Writes table.md, accuracy_flops.png, kept_tokens.png, report.html, overlap.png where the experiment asks for it,
    comparisons.json (every paired comparison, with the ids of flipped answers) and claims.json.

    about  `experiment.json`: row to compare to, question, tables of the paper, claims, kept_tokens, overlap
    data   the data set, for kept_tokens.png; None: that picture stays as it is
    image_processor  the model's, with `data`: kept_tokens.png shows images as the model reads them
    """
    contents = compose(folder, results, about)
    store.replace(folder / "comparisons.json", store.as_json(contents.comparisons, indent=1))
    store.replace(folder / "claims.json", store.as_json(contents.claims, indent=1))
    print_table(main_table(contents.results, contents.comparisons, brief=True), console, wrap=False)
    for table in contents.others:
        print_table(table, console)
    text = markdown(contents.table, level=1) + "".join(f"\n{markdown(table)}" for table in contents.others)
    store.replace(folder / "table.md", text.encode(errors="backslashreplace"))

    written = [folder / "table.md", folder / "accuracy_flops.png"]
    save_spec(accuracy_cost(contents.results), results[0].experiment, written[-1])
    picture, one_image = folder / "kept_tokens.png", about.get("kept_tokens") == "questions"
    if data is not None and kept_tokens(contents.results, contents.outcomes, data, image_processor, picture, one_image):
        written.append(picture)
    if overlap.heat_map(contents.overlaps, folder / "overlap.png"):
        written.append(folder / "overlap.png")
    written.append(write_page(folder, contents))
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)


def compose(folder: Path, results: list[Result], about: dict) -> Report:
    """Read the outcomes, compare the rows, and draw up all tables."""
    recorded = {result.label: store.outcomes_of(folder, result) for result in results}
    failed = {label: failures(outcomes) for label, outcomes in recorded.items()}
    results, outcomes = together(results, {label: answered(all_of) for label, all_of in recorded.items()})
    first, compare_to = results[0].label, about.get("compare_to")
    against: list[str] = list(dict.fromkeys([first, compare_to or first]))
    comparisons = {
        result.label: {other: compare(outcomes[result.label], outcomes[other]) for other in against}
        for result in results
    }
    verdicts = verdicts_on(about.get("claims") or [], outcomes, results[0].experiment)
    section = about.get("overlap")
    overlaps = [] if section is None else list(overlap.overlaps(results, outcomes, section))
    blind = {result.key: result for result in store.read_results(folder / "blind.jsonl")[0]}.get(
        str(about.get("blind"))
    )
    tables = [
        *others.failed_samples(failed),
        *others.blind_accuracy(results, blind, commonest(outcomes[first])),
        *others.by_difficulty(results),
        *([claims.table(verdicts)] if verdicts else []),
        *others.passing_words(results),
        *others.cost_by_part(results),
        *others.costs_of_models(folder),
        *map(others.of_the_paper, about.get("paper") or []),
        *map(overlap.table, overlaps),
    ]
    return Report(
        results=results,
        outcomes=outcomes,
        failed=failed,
        comparisons=comparisons,
        claims=verdicts,
        overlaps=overlaps,
        table=main_table(results, comparisons),
        others=tables,
        question=about.get("question", ""),
        compare_to=compare_to,
    )
