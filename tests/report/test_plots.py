"""The Pareto plots, on the page and for `dvc plots`."""

import re
from xml.etree import ElementTree

from quantline.report.page import render_page
from quantline.report.plots import DIVERGENCE, FLOOR, GOLD, pareto_svg, picture, plot_data
from tests.helpers.report import make_report, make_row, without_gold


def test_plot_takes_title_and_direction_from_the_registry():
    assert DIVERGENCE.full_title == "Size against mean KL divergence from full precision"
    assert DIVERGENCE.axis_label == "mean KL divergence (log)"
    assert DIVERGENCE.sign == 1
    assert GOLD.full_title == "Size against gold accuracy in per cent"
    assert GOLD.axis_label == "gold accuracy, %"
    assert GOLD.sign == -1


def test_plot_points_are_scaled_and_end_at_the_floor():
    row = make_row("a", 2, 0.0)
    assert DIVERGENCE.points([row]) == [(2.0, FLOOR)]
    assert GOLD.points([row]) == [(2.0, 90.0)]
    assert GOLD.front([(2.0, 90.0), (1.0, 80.0), (3.0, 85.0)]) == [(1.0, 80.0), (2.0, 90.0)]


def test_plot_data_has_the_points_and_the_fronts_of_both_plots():
    rows = [without_gold(make_row("a", 2, 0.3)), make_row("b", 3, 0.1), make_row("c", 4, 0.2)]
    rows[2].metrics["gold_accuracy"] = 0.95
    data = plot_data(rows)
    assert [entry["mean_kld_front"] for entry in data] == [True, True, False]
    assert [entry.get("gold_accuracy_front") for entry in data] == [None, True, True]
    assert data[0] == {
        "variant": "a",
        "format": "gguf",
        "size_mib": 2.0,
        "mean_kld": 0.3,
        "gold_accuracy": None,
        "mean_kld_front": True,
    }


def test_pictures_of_dvc_plots_stand_alone_and_are_there_without_figures():
    rows = [make_row("a", 2, 0.01), make_row("b", 3, 0.001)]
    drawn = picture(rows, DIVERGENCE, "a")
    root = ElementTree.fromstring(drawn)  # with its namespace, as a browser wants a file
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "currentColor" not in drawn  # which no page gives a picture
    nothing = picture([without_gold(row) for row in rows], GOLD)
    assert "nothing was measured" in ElementTree.fromstring(nothing)[0].text


def test_pareto_svg_is_the_same_each_time():
    rows = [make_row("a", 2, 0.01), make_row("b", 3, 0.001)]
    assert pareto_svg(rows, DIVERGENCE, "a") == pareto_svg(rows, DIVERGENCE, "a")


def test_page_without_a_gold_set_has_one_plot():
    without = render_page(make_report([without_gold(make_row("a", 2, 0.01))]))
    assert without.count("<svg") == 1
    assert render_page(make_report([make_row("a", 2, 0.01)])).count("<svg") == 2


def test_page_with_two_plots_shares_no_id():
    rows = [make_row("a", 2, 0.01), make_row("b", 3, 0.001)]
    ids = re.findall(r'\bid="([^"]+)"', render_page(make_report(rows)))
    assert len(ids) == len(set(ids)) > 20
