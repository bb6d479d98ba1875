"""Outcomes of the rows of a run on disk: `outcomes/KEY.jsonl`, and `KEY.rank0.jsonl`, … while the row is evaluated.

Every rank appends to a file of its own. Rank 0 merges them at the end of the row, and at the start of a run those that a
stopped one has left, of however many ranks.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ivtp import results as store
from ivtp.data.outcomes import Outcome, is_outcome


class OutcomeFiles:
    """Files of the outcomes of one data set's samples.

    ids  of the samples, in the order of the files
    say  prints a line about what cannot be used
    """

    def __init__(self, folder: Path, ids: Sequence[str], say: Callable[[str], None]) -> None:
        self.folder, self.say = folder / "outcomes", say
        self.place = {name: place for place, name in enumerate(ids)}

    def merged(self, key: str) -> Path:
        """File of a row."""
        return self.folder / f"{key}.jsonl"

    def part(self, key: str, rank: int) -> Path:
        """File of what a rank has evaluated of a row."""
        return self.folder / f"{key}.rank{rank}.jsonl"

    def append(self, key: str, rank: int, outcomes: list[Outcome]) -> None:
        """Append outcomes of a batch to the file of a rank."""
        store.append(self.part(key, rank), store.with_schema(outcomes))

    def gather(self, key: str) -> list[Outcome]:
        """Outcomes of a row from all its files, at most one per sample, in the order of the data; for rank 0.

        A new outcome takes the place of a failure. Torn lines, lines of no sample and samples with several outcomes are set
        aside.
        """
        unusable = Counter[str]()
        files: dict[Path, list[dict]] = {}
        for path in (self.merged(key), *sorted(self.folder.glob(f"{key}.rank*.jsonl"))):
            files[path], torn = store.read(path)
            unusable["torn"] += torn
        outcomes: dict[str, Outcome] = {}
        doubled: set[str] = set()
        for lines in files.values():
            new = [line for line in lines if self.known(line)]
            doubled |= store.repeated(new)
            for outcome in new:
                before = outcomes.setdefault(outcome["id"], outcome)
                if "failed" in before:
                    outcomes[outcome["id"]] = outcome
                elif before != outcome:  # equal ones are left by a kill between merging and removing
                    doubled.add(outcome["id"])
        for path, lines in files.items():
            unusable["of no sample"] += store.set_aside(path, lines, self.known)
            known = [line for line in lines if self.known(line)]
            unusable["doubled"] += store.set_aside(path, known, lambda line: line["id"] not in doubled)
        if unusable.total():
            counts = ", ".join(f"{count} {kind}" for kind, count in unusable.items() if count)
            self.say(f"{self.merged(key)}: {unusable.total()} line(s) set aside ({counts}), to be evaluated again")
        sound = [outcome for name, outcome in outcomes.items() if name not in doubled]
        return sorted(sound, key=lambda outcome: self.place[outcome["id"]])

    def known(self, line: dict) -> bool:
        """True if a line is an outcome of one of the samples."""
        return is_outcome(line) and line["id"] in self.place

    def write(self, key: str, outcomes: list[Outcome]) -> None:
        """Make these the outcomes of a row, and remove the files of the ranks."""
        path, content = self.merged(key), store.lines(store.with_schema(outcomes))
        if (path.read_bytes() if path.is_file() else b"") != content:
            store.replace(path, content)
        for part in self.folder.glob(f"{key}.rank*.jsonl"):
            part.unlink()
