"""Train and evaluate every row of the results, over several seeds, and write the tables.

    python tools/reproduce.py gpu --seeds 1 2 3 --num-gpus 4
    python tools/reproduce.py cpu --seeds 1 2 --minutes 20
    python tools/reproduce.py cpu_usiigaci --seeds 1 2 --minutes 20
    python tools/reproduce.py cpu_imagenet --seeds 1 2 --minutes 20
    python tools/reproduce.py cpu_synthetic --seeds 1 2

``gpu`` is the paper's setting (512x512, ResNet-50, the schedules of the configs); ``cpu`` the small networks, each row
trained for equal time. Both are on DSB2018; ``gpu_usiigaci`` and ``cpu_usiigaci`` are the rows of the methods on the
phase-contrast cells of Usiigaci; ``gpu_imagenet`` and ``cpu_imagenet`` Mask R-CNN beside KG lite on the backbone of the
kept models, from its ImageNet weights; ``cpu_synthetic`` every method for some minutes on cells that all of them can
represent, by datasets/make_synthetic.py. Call it again after any interruption: finished rows are kept, a started
training resumes; ``--dry-run`` shows what is left. Every finished training is one small JSON file in
``results/<plan>/``, and the tables in ``results/<plan>/tables.md`` are made from these files alone (``--tables`` makes
only them).
"""

import argparse
import datetime
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from compare import HEADINGS, TABLES, fit_minutes, markdown_table
from detectron2.config import get_cfg

from kg_detectron.d2.confidence import CONFIDENCE_FILE
from kg_detectron.d2.config import add_kg_config, initial_weights_keys, merge_config
from kg_detectron.inference.model_file import WEIGHTS
from kg_detectron.io.atomic import replacing

ROOT = Path(__file__).resolve().parents[1]
TRIAL_ITERATIONS = 40  # of which the last 20 are timed

CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Row:
    """One line of the tables: a config, and recipes on top of it.

    Attributes:
        name: in the tables.
        config: name in configs/.
        recipes: names in configs/parts/recipe/.
        weights_of: a row whose training serves this one too, which differs in decoding only.
    """

    name: str
    config: str
    recipes: tuple[str, ...] = ()
    weights_of: str = ""


# What decoding and ranking gained, one step after another, beginning with the paper's: a name and a recipe each.
DECODING = {
    "the paper's decoding": "paper_decoding",
    "+ sharper votes": "sharper_votes",
    "+ second hop": "second_hop",
    "+ corner and centre": "corner_and_centre",
    "+ ranked by blur": "ranked_by_blur",
    "+ ranked by overlap": "ranked_by_overlap",
}

# What "kg lite plus" has besides "kg lite", one step after another; then follow MASKS, which need no training of their
# own, and small cells among the targets.
TRAINING = {
    "boxes jittered": "jittered_boxes",
    "+ smaller discs": "disc_radius_2",
    "+ heatmap weight": "heatmap_weight",
}

MASKS = {
    "+ margin": "mask_margin",
    "+ less blur": "less_blur",
}

# What the kept models have besides: needs no training either.
COMPLETION = {"+ completion": "completion"}
# And this has a training of its own, whose last minutes fit the head.
CONFIDENCE = {"+ confidence": "confidence"}


def _steps(base: Row, steps: dict[str, str], *, trained: bool) -> list[Row]:
    """One row for each step on top of the last; where they are not trained, with the weights of the base."""
    model = base.name.partition(":")[0]
    rows, recipes = [], base.recipes
    for name, recipe in steps.items():
        recipes += (recipe,)
        rows.append(Row(f"{model}: {name}", base.config, recipes, "" if trained else base.name))
    return rows


# The rows of the paper's two tables, the baselines made stronger, the state of the art that the paper names, and what
# is ours: by name the config, without its data set and its schedule.
PAPER_SIZE = {
    "kg": "kg_{}",
    "kg plus": "kg_{}_plus",
    "kg lite": "kg_lite_{}",
    "kg lite plus": "kg_lite_{}_plus",
    "mask_rcnn C4": "mask_rcnn_c4_{}",
    "mask_rcnn FPN": "mask_rcnn_fpn_{}",
    "kg seg s1": "kg_{}_seg_s1",
    "kg single scale": "kg_{}_single_scale",
}
SMALL = {
    "kg lite": "kg_lite_{}_cpu",
    "kg lite plus": "kg_lite_{}_plus_cpu",
    "mask_rcnn C4": "mask_rcnn_c4_narrow_{}_cpu",
    "mask_rcnn FPN": "mask_rcnn_fpn_r18_{}_cpu",
    "kg": "kg_r18_{}_cpu",
    "kg plus": "kg_r18_{}_plus_cpu",
    "kg seg s1": "kg_r18_{}_seg_s1_cpu",
    "kg single scale": "kg_r18_{}_single_scale_cpu",
    "kg plus single scale": "kg_r18_{}_plus_single_scale_cpu",
}
OTHERS = ("dcan", "cosine_embedding", "cornernet", "stardist", "fcis")
PAPER_SIZE |= {name: f"{name}_{{}}" for name in OTHERS}
SMALL |= {name: f"{name}_{{}}_cpu" for name in OTHERS}
# From ImageNet weights, whatever is said of the other plans.
IMAGENET = {"kg lite plus": "kg_lite_{}_plus_imagenet", "mask_rcnn FPN": "mask_rcnn_fpn_lite0_{}"}


def _rows(configs: dict[str, str], data: str) -> list[Row]:
    rows = {name: Row(name, config.format(data)) for name, config in configs.items()}
    best = rows["kg lite plus"]
    return [*rows.values(), *_steps(best, COMPLETION, trained=False), *_steps(best, CONFIDENCE, trained=True)]


KG, SMALL_KG = Row("kg", "kg_dsb2018"), Row("kg", "kg_r18_dsb2018_cpu")
LITE, CPU_LITE = Row("kg lite", "kg_lite_dsb2018"), Row("kg lite", "kg_lite_dsb2018_cpu")
SINGLE_SCALE = Row("kg single scale", "kg_r18_dsb2018_single_scale_cpu")
TRAINED = _steps(CPU_LITE, TRAINING, trained=True)

PLANS: dict[str, list[Row]] = {
    "gpu": [
        *_rows(PAPER_SIZE, "dsb2018"),
        *_steps(KG, DECODING, trained=False),
        *_steps(LITE, DECODING, trained=False),
    ],
    "cpu": [
        *_rows(SMALL, "dsb2018"),
        *_steps(SINGLE_SCALE, {"lower threshold": "low_threshold"}, trained=False),
        *_steps(SMALL_KG, DECODING, trained=False),
        *_steps(CPU_LITE, DECODING, trained=False),
        *TRAINED,
        # What the last of these steps gains without the one before it.
        Row("kg lite: heatmap weight, larger discs", CPU_LITE.config, ("jittered_boxes", "heatmap_weight")),
        *_steps(TRAINED[-1], MASKS, trained=False),
    ],
    "gpu_usiigaci": _rows(PAPER_SIZE, "usiigaci"),
    "cpu_usiigaci": _rows(SMALL, "usiigaci"),
    "gpu_imagenet": _rows(IMAGENET, "dsb2018"),
    "cpu_imagenet": _rows({name: f"{config}_cpu" for name, config in IMAGENET.items()}, "dsb2018"),
    "cpu_synthetic": [
        row
        for row in (Row(name, config.format("synthetic")) for name, config in SMALL.items())
        if (CONFIGS / f"{row.config}.yaml").is_file()
    ],
}


def validation_set(plan: str) -> str:
    """The registered dataset that the rows of a plan are evaluated on."""
    *_, data = plan.split("_")
    return f"{data if data in ('usiigaci', 'synthetic') else 'dsb2018'}_val"


def recipe_file(name: str) -> Path:
    """The file of a recipe."""
    return CONFIGS / "parts" / "recipe" / f"{name}.yaml"


class Reproduction:
    """The rows of a plan under one output folder.

    Args:
        plan: a key of `PLANS`.
        output: folder of the runs; they may be large.
        results: folder of the small JSON files and the tables.
        dataset: registered dataset that is evaluated.
        num_gpus: for each training; 0 trains on the CPU.
        minutes: of training for each row, instead of the configs' numbers of iterations; None for those.
        pretrained: start from ImageNet weights, which the configs name, instead of random ones.
        changes: config keys and values for all rows.
    """

    def __init__(
        self,
        plan: str,
        output: Path,
        results: Path,
        *,
        dataset: str,
        num_gpus: int,
        minutes: float | None,
        pretrained: bool,
        changes: Sequence[str],
    ) -> None:
        self.rows = PLANS[plan]
        self.output = output / plan
        self.results = results / plan
        self.dataset = dataset
        self.num_gpus = num_gpus
        self.minutes = minutes
        self.pretrained = pretrained
        self.changes = [*([] if pretrained else _random_weights()), *changes]
        self.changes += [] if num_gpus else ["MODEL.DEVICE", "cpu"]

    def run(self, row: Row, seed: int) -> None:
        """Train and evaluate one row, as far as that has not been done, and write its JSON file.

        Raises:
            subprocess.CalledProcessError: where training or evaluation fails.
        """
        result = self._result(row, seed)
        if result.is_file():
            return
        folder = self._folder(row, seed)
        if row.weights_of:
            self._borrow(row, seed)
        elif not self._is_trained(row, folder):
            self._train(row, seed, folder, self._iterations(row, folder))
        comparison = folder / "comparison"
        device = [] if self.num_gpus else ["--device", "cpu"]
        _python("compare.py", str(folder), "--dataset", self.dataset, "--output", str(comparison), *device)
        report = json.loads((comparison / "comparison.json").read_text())
        figures = report["runs"][0]
        result.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "row": row.name,
            "seed": seed,
            "config": row.config,
            "recipes": list(row.recipes),
            "changes": self.changes,
            "dataset": report["dataset"],
            "images": report["images"],
            "initial_weights": "ImageNet" if self.pretrained else "random",
            "device": torch.cuda.get_device_name() if self.num_gpus else report["device"],
            "iterations": yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["MAX_ITER"],
            "date": datetime.date.today().isoformat(),
            "commit": _commit(),
            "figures": figures,
        }
        with replacing(result) as unfinished:
            unfinished.write_text(json.dumps(facts, indent=2) + "\n")

    def state(self, row: Row, seed: int) -> str:
        """What `run` would do, in words."""
        if self._result(row, seed).is_file():
            return "done"
        recipes = "".join(f" + {recipe}" for recipe in row.recipes)
        if row.weights_of:
            return f"decodes {row.weights_of} by {row.config}{recipes}"
        if self._is_trained(row, self._folder(row, seed)):
            return "is trained; to be evaluated"
        length = "its iterations" if self.minutes is None else f"{self.minutes:g} minutes"
        return f"trains {row.config}{recipes}, {length}, and is evaluated on {self.dataset}"

    def _is_trained(self, row: Row, folder: Path) -> bool:
        """Whether the run in a folder came to its end, which is the fit of a confidence head where there is one."""
        ends = [WEIGHTS[-1], *([CONFIDENCE_FILE] if CONFIDENCE["+ confidence"] in row.recipes else [])]
        return all((folder / name).is_file() for name in ends)

    def _result(self, row: Row, seed: int) -> Path:
        return self.results / f"{file_name(row.name)}_seed{seed}.json"

    def _folder(self, row: Row, seed: int) -> Path:
        return self.output / f"{file_name(row.name)}_seed{seed}"

    def _train(self, row: Row, seed: int, folder: Path, iterations: int | None) -> None:
        opts = [*self.changes, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
        opts += ["DATASETS.TEST", "()"]  # compare.py evaluates
        if iterations is not None:
            opts += ["SOLVER.MAX_ITER", str(iterations)]
        config = _write_config(folder / "row.yaml", CONFIGS / f"{row.config}.yaml", row.recipes)
        _python("train_net.py", "--config-file", str(config), "--num-gpus", str(self.num_gpus), "--resume", *opts)

    def _iterations(self, row: Row, folder: Path) -> int | None:
        """How many fit into the minutes, by a short trial; the same again for a training that is resumed."""
        if self.minutes is None:
            return None
        noted = folder / "iterations.json"
        if not noted.is_file():
            trial = folder / "trial"
            shutil.rmtree(trial, ignore_errors=True)
            self._train(row, 0, trial, TRIAL_ITERATIONS)
            last = json.loads((trial / "metrics.json").read_text().splitlines()[-1])
            minutes = self.minutes - fit_minutes(trial)
            noted.write_text(json.dumps({"iterations": max(1, round(minutes * 60 / last["time"]))}))
            shutil.rmtree(trial)
        return json.loads(noted.read_text())["iterations"]

    def _borrow(self, row: Row, seed: int) -> None:
        """Make a run of the other row's weights and this row's config."""
        owner = next(other for other in self.rows if other.name == row.weights_of)
        self.run(owner, seed)
        source, folder = self._folder(owner, seed), self._folder(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        cfg = get_cfg()
        add_kg_config(cfg)
        merge_config(cfg, str(_write_config(folder / "row.yaml", source / "config.yaml", row.recipes)))
        (folder / "config.yaml").write_text(cfg.dump())
        shutil.copyfile(source / "metrics.json", folder / "metrics.json")
        weights = next(source / name for name in WEIGHTS if (source / name).is_file())
        shutil.copyfile(weights, folder / WEIGHTS[-1])


def tables(results: Path, rows: Sequence[Row]) -> str:
    """Markdown: the tables of `compare.py`, mean ± sample standard deviation over seeds, and how each row was made."""
    found = {}
    for row in rows:
        files = sorted(results.glob(f"{file_name(row.name)}_seed*.json"))
        if files:
            found[row.name] = [json.loads(path.read_text()) for path in files]
    parts = []
    for title, keys in TABLES.items():
        lines = []
        for name, runs in found.items():
            seeds = ", ".join(str(one["seed"]) for one in runs)
            lines.append([name, seeds, *(spread([one["figures"][key] for one in runs]) for key in keys)])
        parts.append(markdown_table(title, ["model", "seeds", *(HEADINGS[key][0] for key in keys)], lines))
    notes = []
    for name, runs in found.items():
        facts = {(o["config"], f"{o['initial_weights']} weights", o["device"], o["date"], o["commit"]) for o in runs}
        notes.append(f"- {name}: " + "; ".join(", ".join(fact) for fact in sorted(facts)) + ".")
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation, the mean alone for one value; n/a where one is undefined."""
    if any(value is None or math.isnan(value) for value in values):
        return "n/a"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 and len(set(values)) > 1 else mean


def file_name(row: str) -> str:
    """The name of a row in names of files: "kg lite: + second hop" is "kg_lite-second_hop"."""
    model, _, step = row.partition(":")
    words = (re.findall(r"\w+", part.replace("'s ", "s ")) for part in (model, step))
    return "-".join(filter(None, map("_".join, words)))


def _random_weights() -> list[str]:
    """The config keys and values that make every model start from random weights."""
    return ["MODEL.WEIGHTS", "", *(option for key in initial_weights_keys() for option in (key, ""))]


def _write_config(path: Path, base: Path, recipes: Sequence[str]) -> Path:
    """A config of a base and recipes on top of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [str(file) for file in (base.resolve(), *map(recipe_file, recipes))]
    path.write_text(json.dumps({"_BASE_": files}) + "\n")  # which is YAML too
    return path


def _python(tool: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), *arguments]
    print("+", *command, flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def _commit() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plan", choices=sorted(PLANS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of the plan, by name")
    parser.add_argument("--minutes", type=float, help="of training a row (default: the iterations of the configs)")
    parser.add_argument("--num-gpus", type=int, help="default: 1 for gpu, 0 for cpu")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet weights, not from random ones")
    parser.add_argument("--dataset", help="registered dataset to evaluate (default: the validation part of the plan's)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "reproduce", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the small files")
    parser.add_argument("--dry-run", action="store_true", help="show the rows, and what of them is there")
    parser.add_argument("--tables", action="store_true", help="train nothing; make the tables of what is there")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys and values for all rows"
    )
    options = parser.parse_args(arguments)
    rows = PLANS[options.plan]
    unknown = set(options.rows or ()) - {row.name for row in rows}
    if unknown:
        parser.error(f"--rows: {sorted(unknown)} not in the plan {options.plan}: {[row.name for row in rows]}")
    num_gpus = options.num_gpus if options.num_gpus is not None else int(options.plan.startswith("gpu"))
    reproduction = Reproduction(
        options.plan,
        options.output,
        options.results,
        dataset=options.dataset or validation_set(options.plan),
        num_gpus=num_gpus,
        minutes=options.minutes,
        pretrained=options.pretrained or options.plan.endswith("imagenet"),
        changes=options.opts,
    )
    if options.dry_run:
        for seed in options.seeds:
            for row in rows:
                if not options.rows or row.name in options.rows:
                    print(f"{row.name}, seed {seed}: {reproduction.state(row, seed)}")
        return 0
    failed = []
    if not options.tables:
        for seed in options.seeds:
            for row in rows:
                if options.rows and row.name not in options.rows:
                    continue
                try:
                    reproduction.run(row, seed)
                except subprocess.CalledProcessError as error:  # the other rows go on
                    failed.append(f"{row.name}, seed {seed}: {error}")
    text = tables(reproduction.results, rows)
    if reproduction.results.is_dir():
        (reproduction.results / "tables.md").write_text(text)
    print(text)
    for line in failed:
        print("FAILED", line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
