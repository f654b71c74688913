"""The report as one self-contained HTML file and as Markdown."""

import re
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantline.config.compose import as_yaml
from quantline.report import budgets
from quantline.report.plots import DIVERGENCE, GOLD, pareto_svg
from quantline.report.tables import harness_columns, machines

MIB = 2**20
MOST_FLIPS = 60  # of a variant on the page


def html(report: dict) -> str:
    """The page. All text is escaped; nothing is fetched from anywhere."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True)
    measured = [row for row in report["variants"] if row["status"] == "ok"]
    answered = [row for row in measured if "gold_accuracy" in row["metrics"]]
    # Made here from numbers and checked names, so no text of a model is in it.
    plots = [{"svg": Markup(pareto_svg(rows, axis, report["pick"])),
              "caption": f"{axis.title}; the line joins the Pareto front, the pick is bold."}
             for rows, axis in ((measured, DIVERGENCE), (answered, GOLD)) if rows]
    return environment.get_template("page.html.jinja").render(
        r=report, plots=plots, serve_parts=serve_parts, most_flips=MOST_FLIPS, harness=harness_columns(measured), machines=machines(measured),
        params_yaml=as_yaml(report["params"]),
        at_commit="" if report["commit"] == "unknown" else f"git checkout {report['commit']}\n")


def serve_parts(text: str) -> list[tuple[str, str]]:
    """(words, code) by turns, of the lines in a bundle's README that serve it; either may be empty."""
    parts = [part.strip("\n") for part in re.split(r"^```\w*$", text, flags=re.MULTILINE)]
    return list(zip_longest((words.strip() for words in parts[::2]), parts[1::2], fillvalue=""))


def markdown(report: dict) -> str:
    """The decision and the table."""
    lines = [f"# {report['model']}: {report['pick'] or 'nothing to ship'} (target {report['target']['name']})", ""]
    lines += [f"- {reason}" for reason in report["reasons"]]
    lines += ["", "| variant | MiB | bits/weight | KL divergence | perplexity | gold | tokens/s |",
              "|---|---:|---:|---:|---:|---:|---:|"]
    for row in report["variants"]:
        if row["status"] != "ok":
            lines.append(f"| {row['variant']} | failed: {row['failure']} | | | | | |")
            continue
        m = row["metrics"]
        gold = f"{m['gold_accuracy']:.1%}" if "gold_accuracy" in m else "–"
        lines.append(f"| {row['variant']} | {m['size_bytes'] / MIB:.1f} | {m['bits_per_weight']:.2f} | "
                     f"{m['mean_kld']:z.5f} ± {m['mean_kld_se']:.5f} | {m['perplexity']:.3f} | {gold} | "
                     f"{row['speed']['decode_tok_s']:.0f} |")
    fitted = [f"- {budgets.said(row)}" for row in report["variants"] if row.get("beside")]
    lines += ["", "Fitted to a budget:", "", *fitted] if fitted else []
    others = [f"- {row['variant']}: {'; '.join(row['why_not'])}" for row in report["variants"]
              if row["variant"] != report["pick"]]
    return "\n".join([*lines, *(["", "Why not the others:", "", *others] if others else [])]) + "\n"
