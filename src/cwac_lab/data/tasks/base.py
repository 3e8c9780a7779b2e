"""The task protocol: where rows come from, how they become prompts, how an answer is read and scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cwac_lab.data.reading import LONGEST
from cwac_lab.models.templates import Turn


@dataclass(frozen=True)
class TaskRow:
    """One item of a task: a stable id, the prompt, the target response and the gold answer.

    ``before`` is what was said before the prompt, where it goes on with a conversation; ``at`` is where the row stands,
    file and line, where it comes from a file.
    """

    id: str
    prompt: str
    response: str
    gold: str
    before: tuple[Turn, ...] = ()
    at: str = field(default="", compare=False)

    @property
    def prompts(self) -> list[str]:
        """What users ask, turn by turn."""
        return [turn.text for turn in self.before if turn.role == "user"] + [self.prompt]

    @property
    def asked(self) -> str | tuple[Turn, ...]:
        """What a model is asked: the prompt, or the conversation that it ends."""
        return (*self.before, Turn("user", self.prompt)) if self.before else self.prompt


@dataclass(frozen=True)
class TaskData:
    """Rows of a task, disjoint: to train on, to tune on, to report on; and what was left out of them, in words."""

    train: list[TaskRow]
    validation: list[TaskRow]
    test: list[TaskRow]
    remarks: list[str] = field(default_factory=list)


def with_input(instruction: str, text: str) -> str:
    """Return an instruction followed by its input; the chat template takes the place of the Alpaca frame."""
    return f"{instruction.rstrip()}\n\nInput: {text}"


@dataclass
class HubSource:
    """A data set of the hub, as ``datasets.load_dataset`` takes it.

    Attributes:
        path: Repository, or the format (``json``) of ``data_files``.
        name: Configuration of the repository.
        revision: Commit or tag.
        data_files: Address of a file, for a repository whose loading script cannot be run.
        split: Split of the hub; by default the one that the task names.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    data_files: str | None = None
    split: str | None = None


@dataclass
class Task:
    """Base of the tasks. A task is one class in one file and one YAML that sets its fields.

    Attributes:
        name: Name of the task, also the folder of its rows in ``data=local``.
        hub: Where ``data=hub`` finds it.
        hub_test: Where ``data=hub`` finds the test rows, if elsewhere.
        train_split: Split that training and validation rows are drawn from; with ``data=local`` the file's name.
        test_split: The same for test rows.
        max_new_tokens: Length of the answers generated for scoring.
        train_on: Answers of a conversation that are learned: all of the ``assistant``'s, or the ``last``.
        system_rates: Ask prompts under the system prompt of the rows as well, where they have one, and show both rates.
        empty_on_hub: Columns that are known to be empty in some rows of the hub's version, which leaves those out;
            anywhere else an empty cell is an error.
    """

    empty_on_hub: ClassVar[tuple[str, ...]] = ()
    # Whether the loss on the answers of test rows is measured: where answers are more than a label.
    held_out_loss: ClassVar[bool] = False
    # What every prompt of the task begins with, as ``with_input`` puts it; empty where prompts are as users ask them.
    opening: ClassVar[str] = ""

    name: str = ""
    hub: HubSource = field(default_factory=lambda: HubSource(""))
    hub_test: HubSource | None = None
    train_split: str = "train"
    test_split: str = "test"
    max_new_tokens: int = 8
    train_on: str = "assistant"
    system_rates: bool = True

    def own_rows(self, split: str, longest: int = LONGEST, *, scored: bool = False) -> list[TaskRow] | None:
        """Return the rows of a split (``train`` or ``test``) that the task has of its own, whatever ``data`` is.

        None where it has none: then rows are those of ``data``. ``longest`` is how many MiB a line may have. Some
        rows of ``train`` are answered and ``scored`` where settings are chosen on them.
        """
        return None

    @property
    def system(self) -> str | None:
        """The system prompt that rows to train on have most often: refusals are held and measured under it too.

        None where they have none.
        """
        return None

    @property
    def remarks(self) -> list[str]:
        """What is to be told of rows that were read."""
        return []

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return ``n`` generated rows with the columns of the hub version."""
        raise LookupError("this task has no embedded data")

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Turn a raw row into prompt, target response and gold answer.

        Raises:
            KeyError: If it lacks a column.
            ValueError: If a cell is empty or holds something else; who reads the file adds where the row stands.
        """
        raise LookupError(f"task {self.name} does not format rows")

    def extract(self, output: str) -> str | None:
        """Read the answer from a model's output; None where there is none."""
        raise LookupError(f"task {self.name} does not read answers")

    def correct(self, output: str, gold: str) -> bool | None:
        """Tell whether an output answers as the gold does; None where no rule can tell, so that it does not count."""
        answer = self.extract(output)
        return answer is not None and answer == gold
