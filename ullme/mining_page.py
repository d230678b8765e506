"""The mining report as a page that people look at: scores as a histogram, the teachers, and rows with their texts. Plain HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["page"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #bbb; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; margin: 0; font: 12px/1.4 ui-monospace, monospace; }
.positive { background: #e9f5ec; }
article { border-top: 1px solid #ddd; padding: .8rem 0; } svg text { font-size: 11px; fill: #555; }
"""
WIDTH, HEIGHT = 640, 150


def page(report: Mapping[str, Any]) -> str:
    """The page of one mining report, complete with its styles."""
    rows = [
        ("queries", f"{report['queries']:,}"),
        ("pool", f"{report['pool']['documents']:,} documents ({report['pool']['left_out']:,} left out: {report['pool']['rule']})"),
        ("negatives mined", f"{report['negatives']['mined']:,}"),
        ("given by the source", f"{report['negatives']['from_source']:,}"),
        ("missing", f"{report['shortfall']['negatives']:,} of {report['shortfall']['queries']:,} queries"),
        ("score no less than a positive", f"{report['suspected_false_negatives']:,}"),
        *((f"passed over: {reason}", f"{count:,}") for reason, count in report["passed_over"].items()),
        *((f"of the source, dropped: {reason}", f"{count:,}") for reason, count in report["negatives"]["source_dropped"].items()),
    ]
    judged = report.get("judge")
    if judged:
        rows += [
            ("the judge finds the positive", f"{judged['finds_positive']:.1%} ({judged['kind']}; chance {judged['chance']:.1%})"),
            (f"suspected by the judge ({judged['became_of_them']})", f"{judged['suspects']:,}"),
        ]
    teachers = "".join(
        f"<tr><td>{escape(name)}</td><td class=n>{of['ndcg_at_10']:.3f}</td><td class=n>{of['queries']:,}</td></tr>"
        for name, of in report["teachers"].items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Hard negatives</title><style>{STYLE}</style>"
        f"<h1>Hard negatives, {escape(str(report['miner']['kind']))}</h1>"
        f"<table>{''.join(f'<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>' for name, value in rows)}</table>"
        f"<h2>How well the teachers rank</h2><table><tr><th>teacher<th>nDCG@10<th>train queries</tr>{teachers}</table>"
        f"<h2>Scores of the negatives</h2>{_histogram(report['scores']['edges'], report['scores']['counts'])}"
        f"{_datasets(report['datasets'])}"
        f"<h2>{len(report['samples'])} rows, drawn by seed</h2>{''.join(map(_sample, report['samples']))}</html>\n"
    )


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> str:
    if not counts:
        return "<p>No negative was mined.</p>"
    most, wide = max(counts), WIDTH / len(counts)
    bars = "".join(
        f'<rect x="{place * wide:.1f}" y="{HEIGHT * (1 - count / most):.1f}" width="{wide - 1:.1f}" '
        f'height="{HEIGHT * count / most:.1f}" fill="#4c78a8">'
        f"<title>{edges[place]:.3f} to {edges[place + 1]:.3f}: {count:,}</title></rect>"
        for place, count in enumerate(counts)
    )
    ends = (
        f'<text x="0" y="{HEIGHT + 14}">{edges[0]:.3f}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{edges[-1]:.3f}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" width="{WIDTH}" role="img" aria-label="histogram of scores">{bars}{ends}</svg>'
    )


def _datasets(datasets: Mapping[str, Mapping[str, int]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class=n>{of['queries']:,}</td><td class=n>{of['mined']:,}</td>"
        f"<td class=n>{of['suspected_false_negatives']:,}</td></tr>"
        for name, of in datasets.items()
    )
    return "<h2>Data sets</h2><table><tr><th>data set<th>queries<th>negatives<th>suspected false negatives</tr>" + rows + "</table>"


def _sample(sample: Mapping[str, Any]) -> str:
    positives = "".join(_text("positive", "", one) for one in sample["positives"])
    negatives = "".join(_text("negative", f"{one['score']:.3f}", one) for one in sample["negatives"])
    return f"<article><p><b>{escape(sample['query'])}</b></p><table>{positives}{negatives}</table></article>"


def _text(role: str, score: str, one: Mapping[str, Any]) -> str:
    shown = f"<b>{escape(one['id'])}</b><pre>{escape(one['text'])}</pre>"
    return f"<tr class={role}><td>{role}</td><td class=n>{score}</td><td>{shown}</td></tr>"
