from __future__ import annotations

import base64
import copy
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from kerasdefense.evaluation.html import Examples, choose_examples, write_report
from kerasdefense.evaluation.report import check_results, note, wilson

HOSTILE = '<script src="http://evil.example/x.js">"&\'</script>'
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)*(?:e[-+]?\d+)?(?:/255)?")


class Page(HTMLParser):
    """What a test asks of a page: its tags, and the text that is neither style, axis nor caption."""

    VOID = ("meta", "img", "path")

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.skipped, self.words = [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in self.VOID:
            self.open.append(tag)
            if tag in ("style", "figcaption") or "tick" in given.get("class", "").split():
                self.skipped.append(len(self.open))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open[-1] == tag, f"{tag} closes {self.open[-1]}"
        if self.skipped and self.skipped[-1] == len(self.open):
            self.skipped.pop()
        self.open.pop()

    def handle_data(self, data):
        if not self.skipped:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag, attribute):
        return [given[attribute] for found, given in self.tags if found == tag and attribute in given]


def candidates(shape, *, labels=("cat", "dog", "ship"), fooled=True):
    random = np.random.default_rng(0)
    image = random.uniform(size=[16, *shape]).astype(np.float32)
    image_adv = np.clip(image + random.choice([-8 / 255, 8 / 255], image.shape), 0, 1).astype(np.float32)
    label = np.arange(16) % 3
    before = np.where(np.arange(16) < 12, label, (label + 1) % 3)
    after = np.where(np.arange(16) % 2 == 0, (label + 2) % 3, before) if fooled else before
    return image, image_adv, label, before, after, labels


@pytest.fixture
def render(tmp_path):
    def written(results, images=None, title="pgd_at on cifar10", pictures=None):
        write_report(tmp_path / "report.html", results, title=title, images=images, pictures=pictures)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return written


@pytest.fixture
def pictures(tmp_path):
    """Return the files of two different pictures."""
    paths = {name: tmp_path / f"open_set_{name}.png" for name in ("scores", "roc")}
    for width, path in enumerate(paths.values(), start=3):
        Image.new("RGB", (width, 2), "white").save(path)
    return paths


def figures(content):
    """Return every number and string in what results.json holds, the names of its fields among them."""
    if isinstance(content, dict):
        return [*content, *(each for value in content.values() for each in figures(value))]
    if isinstance(content, (list, tuple)):
        return [each for value in content for each in figures(value)]
    return [content]


def traceable(results):
    """Return what may stand on the page as a number."""
    allowed = set()
    count = results["clean_accuracy"]["n"]
    after_each = [wilson(round(each["cascaded_accuracy"] * count), count)["ci95"] for each in results["attacks"]]
    detectors = (results.get("open_set") or {"detectors": {}})["detectors"]
    accepted = [entry["grid"]["both_attacked"]["known_accepted"] for entry in detectors.values() if entry["grid"]]
    refused = [1 - each for known in accepted for each in (known["value"], *known["ci95"])]
    for figure in [*figures(results), *figures(after_each), *refused]:
        if isinstance(figure, str):
            allowed |= set(NUMBER.findall(figure)) | {figure}
        elif isinstance(figure, (int, float)):
            forms = ("{:,}", "{}", "{:,.1f}", "{:.3g}", "{:.4g}", "{:g}")
            allowed |= {form.format(figure) for form in forms} | {f"{100 * figure:.1f}", f"{round(255 * figure)}/255"}
            allowed |= {f"{int(figure):,}"} if float(figure).is_integer() else set()
    return allowed


def test_every_number_on_the_page_is_in_the_results(render, results):
    page = Page(render(results, choose_examples(*candidates((32, 32, 3)))))
    text = page.text.replace("95 % interval", "")
    numbers = NUMBER.findall(text)
    unknown = sorted({number.strip(",.") for number in numbers} - traceable(results))
    assert len(numbers) > 150 and unknown == []
    for words in ("34.4 %", "31.5 to 37.4 %", "61.7 %", "n = 1,000", "L∞ ball of radius 8/255", "AutoAttack standard"):
        assert words in text


def test_page_says_which_attacks_of_a_cascade_stand_alone(render, results):
    assert "alone: it met every image" not in render(results)
    attack = results["attacks"][1]
    attack["alone"] = True
    page = render(results)
    assert page.count("alone: it met every image that is right clean") == 1
    assert "but for those that stand for themselves alone" in page
    row = page[page.index(f"{attack['name']}") :].split("</tr>")[0]
    assert f"{100 * attack['own_accuracy']['value']:.1f}" in row


def test_a_changed_figure_is_not_traceable(render, results):
    other = copy.deepcopy(results)
    other["robust_accuracy"]["value"] = 0.5432
    assert "54.3" in NUMBER.findall(Page(render(other)).text) and "54.3" not in traceable(results)


@pytest.mark.parametrize("images", [None, "few"])
def test_page_asks_for_nothing_from_outside_and_runs_no_script(render, results, images):
    results["note"] += " See https://example.org/paper."
    source = render(results, images and choose_examples(*candidates((8, 8, 1))))
    page = Page(source)
    assert page.open == []
    links = [given[name] for _, given in page.tags for name in ("src", "href", "data", "srcset") if name in given]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert len(links) == (36 if images else 0)
    assert not {"script", "link", "iframe", "object", "base", "a"} & {tag for tag, _ in page.tags}
    style = source[: source.index("</style>")]
    assert "url(" not in style and "@import" not in style and not re.search(r"\son\w+=", source)


def test_page_is_accessible(render, results):
    source = render(results, choose_examples(*candidates((8, 8, 1))))
    page = Page(source)
    assert page.all("html", "lang") == ["en"] and page.all("meta", "name")[0] == "viewport"
    assert len(page.all("img", "alt")) == 36 and all(page.all("img", "alt"))
    headers = [given for tag, given in page.tags if tag == "th"]
    assert headers and all(given.get("scope") in ("row", "col") for given in headers)
    assert all(given.get("aria-label") for tag, given in page.tags if tag == "svg")
    assert "prefers-color-scheme: dark" in source and "@media print" in source and "max-width: 720px" in source


def test_hostile_names_are_escaped(render, results):
    results["model"]["name"] = results["attacks"][0]["name"] = results["sanity"][0]["detail"] = HOSTILE
    results["config"]["data"][HOSTILE] = results["versions"][HOSTILE] = HOSTILE
    source = render(results, choose_examples(*candidates((8, 8, 1), labels=(HOSTILE,) * 3)), title=HOSTILE)
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.tags} and "<script" not in source
    assert not any("evil" in value for tag, given in page.tags for name, value in given.items() if name != "alt")
    assert all(HOSTILE in alt for alt in page.all("img", "alt") if not alt.startswith("Difference"))


def test_banner_names_the_failed_items_that_gate(render, results):
    text = Page(render(results)).text
    banner = text[text.index("Not to be trusted") : text.index("Robust accuracy")]
    assert "S4 failed: nothing stands when any image may be swapped" in banner and "0.00781" in banner
    assert "S12" not in banner and "No check failed" not in text
    assert "Upper bound" not in text and "Preliminary" not in text


def trusted(results):
    for item in results["sanity"]:
        item["status"] = "pass" if item["status"] == "fail" else item["status"]
    results["trusted"] = True
    return results


def test_banner_of_a_trusted_evaluation_says_so_and_no_more(render, results):
    trusted(results)
    results["note"] = note(results, "autoattack")
    source = render(results)
    assert "No check failed" in source and "Not to be trusted" not in source and source.count('class="banner') == 1


def test_banner_of_an_evaluation_that_nothing_checked_claims_nothing(render, results):
    results["sanity"], results["trusted"] = [], True
    text = Page(render(results)).text
    assert "Not checked" in text and "No check failed" not in text and "The sanity battery has not run." in text
    trusted(results)["sanity"] = [{**CHECK, "gates": False}, {**CHECK, "status": "not_run"}]
    assert "Not checked" in Page(render(results)).text


CHECK = {"id": "S12", "asks": "x", "status": "pass", "value": 0.1, "threshold": 0.2, "detail": "", "gates": True}


def test_banners_of_a_preliminary_evaluation_that_was_stopped(render, results):
    trusted(results)["complete"] = False
    results["clean_accuracy"] = wilson(123, 200)
    results["note"] = note(results, "autoattack")
    text = Page(render(results)).text
    assert "Upper bound: stopped early" in text and "at most 34.4 %" in text
    assert "Preliminary fewer than 1000 images." in text and text.count("AutoAttack standard") == 1


def test_page_is_the_same_each_time(render, results):
    images = choose_examples(*candidates((32, 32, 3)))
    assert render(results, images) == render(copy.deepcopy(results), choose_examples(*candidates((32, 32, 3))))


def test_page_without_optional_blocks(render, results):
    kept = ("clean_accuracy", "robust_accuracy", "attacks")
    text = Page(render({name: results[name] for name in kept})).text
    assert "Not measured." in text and "The sanity battery has not run." in text and "Examples" not in text
    assert "L∞ ball of radius 8/255" in text


def test_page_of_an_l2_evaluation_with_one_class_less_and_single_radius(render, results):
    for threat in (results["threat_model"], *(attack["threat_model"] for attack in results["attacks"])):
        threat.update(norm="l2", epsilon=1.0)
    results["curve"] = [{**point, "epsilon": 0.125 * number} for number, point in enumerate(results["curve"])]
    results["attacks"][1]["replaces"] = "apgd_t: the targeted DLR loss needs 4 classes, there are 2"
    text = Page(render(results, choose_examples(*candidates((8, 8, 1))))).text
    assert "L₂ ball of radius 1 " in text and "in place of apgd_t: the targeted DLR" in text
    assert "the largest change of each image" in text
    results["curve"] = results["curve"][:1]
    assert "Not measured." in Page(render(results)).text


def test_page_of_a_random_model_shows_the_protocol(render, results):
    results["flags"]["randomised"] = True
    results["randomised"] = {
        "R1_fixed_noise": {**wilson(240, 1000), "clean": wilson(617, 1000), "left": {"apgd_ce": wilson(250, 1000)}},
        "R2_autoattack_rand": {"apgd_ce": wilson(415, 1000), "apgd_dlr": wilson(405, 1000)},
        "R3_pgd200_eot": None,
        "R4_square": wilson(425, 1000),
        "R5_scaling": [{"draws": draws, **wilson(20, 32)} for draws in (1, 128)],
        "R6_fresh_draws": {
            "single_draw": {"value": 0.401, "n": 1000, "draws": 20},
            "majority_vote": wilson(400, 1000),
            "any_of_10": wilson(300, 1000),
        },
        "keyed": False,
    }
    check_results(results)
    text = Page(render(results)).text
    block = text[text.index("A model that draws at random") :]
    for words in (
        "R1 AutoAttack on the model with its draw held fixed 24.0 %",
        "left by apgd ce 25.0 %",
        "R3 a long PGD on the mean over draws not measured",
        "apgd dlr 40.5 %",
        "draws: 128 62.5 %",
        "any of 10 30.0 %",
    ):
        assert words in block
    assert (
        "the model draws at random, so AutoAttack rand" in text and "Suite autoattack: AutoAttack standard" not in text
    )


def test_not_run_is_never_shown_as_passed(render, results):
    row = re.search(r'<tr role="row" class="idle">.*?S16.*?</tr>', render(results), re.DOTALL).group()
    assert "not run" in row and "passed" not in row and "does not gate" not in row


def unknown_images(source):
    """Return the source of the section on unknown images, and its page."""
    section = re.search(
        r'<section class="card long" aria-labelledby="unknown">.*?</section>', source, re.DOTALL
    ).group()
    return section, Page(section)


def row_of(section, table, detector):
    """Return the text of a detector's row in the table that the heading `table` names."""
    found = section[section.index(f">{table}</h3>") :]
    rows = re.findall(r'<tr role="row">.*?</tr>', found[: found.index("</table>")], re.DOTALL)
    return next(page.text for page in map(Page, rows) if page.text.startswith(detector))


def test_unknown_images_are_shown_with_every_figure_from_the_results(render, results, open_set, pictures):
    results["open_set"] = open_set
    check_results(results)
    source = render(results, pictures=pictures)
    section, page = unknown_images(source)
    numbers = NUMBER.findall(re.sub("95 % (of|interval)", "", page.text))
    assert len(numbers) > 150 and sorted({each.strip(",.") for each in numbers} - traceable(results)) == []
    words = "max logit 83.0 % 79.9 to 86.0 % 43.8 % 39.2 % 58.1 % 74.2 % 61.4 % 32.3 % 27.3 to 37.8 %"
    assert row_of(section, "Known against unknown classes", "max logit") == words
    assert row_of(section, "Known against tiny (near)", "openmax").startswith("openmax 82.0 %")
    words = "mahalanobis 81.1 % 43.8 % 39.2 % 56.8 % 74.3 % 61.5 %"
    assert row_of(section, "Mean over the far sets", "mahalanobis") == words
    words = "openmax class 3: fewer than 3 different distances, so a step replaces the distribution 0.9991 95.1 %"
    assert row_of(section, "Thresholds", "openmax").startswith(words)
    words = "max logit 84.1 % 81.0 to 87.1 % 55.3 % 52.2 to 58.3 % 46.8 % 43.6 to 49.8 % 52.2 % 49.1 to 55.2 %"
    assert row_of(section, "AUROC by who is attacked", "max logit") == words
    words = "mahalanobis 58.9 % 22.2 % 43.0 % 37.5 to 48.7 % 96.0 % 93.1 to 97.7 % 34.3 % 29.2 to 39.9 %"
    assert row_of(section, "What the attacks leave", "mahalanobis") == words
    lead = (
        "Scores of 300 known images were raised and those of 300 unknown ones (unknown classes) lowered, in the L∞ "
        "ball of radius 8/255, by APGD (100 steps, 1 start) and Square (5,000 queries), seed 7. The threshold was set "
        "on clean validation images and never moved."
    )
    assert lead in page.text and "orthogonal JointPGD (100 steps, 1 start) and JointPGD (100" in page.text
    assert "from the share accepted" in source


def test_pictures_of_unknown_images_stand_in_the_page(render, results, open_set, pictures):
    source = render({**results, "open_set": open_set}, pictures=pictures)
    _, page = unknown_images(source)
    found = [base64.b64decode(each.partition("data:image/png;base64,")[2]) for each in page.all("img", "src")]
    assert found == [path.read_bytes() for path in pictures.values()]
    alt = page.all("img", "alt")
    assert "attacked ones as lines" in alt[0] and "dashed while both are attacked" in alt[1]
    assert all(str(path) not in source for path in pictures.values())
    assert page.open == [] and all(given.get("scope") for tag, given in page.tags if tag == "th")
    names = [given["id"] for _, given in Page(source).tags if "id" in given]
    assert len(names) == len(set(names)) and set(page.all("table", "aria-labelledby")) <= set(names)
    assert all(given["data-label"] for tag, given in page.tags if tag == "td")
    assert unknown_images(render({**results, "open_set": open_set}))[1].all("img", "src") == []


@pytest.mark.parametrize("block", [{}, {"open_set": None}])
def test_page_without_unknown_images_reads_no_pictures(render, results, tmp_path, block):
    source = render({**results, **block}, pictures={"scores": tmp_path / "missing.png"})
    assert "Unknown images" not in source and "<img" not in source and "from the share accepted" not in source


def test_unknown_images_whose_score_nobody_attacked(render, results, open_set, pictures):
    open_set["attack"] = None
    for entry in open_set["detectors"].values():
        entry["grid"] = entry["reject"] = None
    _, page = unknown_images(render({**results, "open_set": open_set}, pictures=pictures))
    assert "Thresholds" in page.text and "Known against svhn (far)" in page.text
    assert "Attacks on the score" not in page.text and "not run" not in page.text
    assert not any("attacked" in alt for alt in page.all("img", "alt"))


def test_detectors_without_unknown_images_show_thresholds_alone(render, results, open_set):
    open_set.update(attack=None, sets={})
    for entry in open_set["detectors"].values():
        entry.update(sets={}, means={}, grid=None, reject=None)
    _, page = unknown_images(render({**results, "open_set": open_set}))
    assert page.all("table", "aria-labelledby") == ["thresholds"] and "FPR95" not in page.text


def test_names_of_sets_and_notes_are_escaped(render, results, open_set, pictures):
    name = "<b>x"
    open_set["sets"][name] = open_set["sets"].pop("tiny")
    open_set["attack"]["set"] = name
    for entry in open_set["detectors"].values():
        entry["sets"][name] = entry["sets"].pop("tiny")
        entry["notes"] = [HOSTILE]
    open_set["detectors"][HOSTILE] = open_set["detectors"].pop("max_logit")
    source = render({**results, "open_set": open_set}, pictures=pictures)
    section, page = unknown_images(source)
    assert name not in section and "<script" not in section and "script" not in {tag for tag, _ in page.tags}
    for words in ("Known against <b>x (near)", "300 unknown ones (<b>x) lowered", HOSTILE):
        assert words in page.text
    assert page.text.count("<b>x") == 3


@pytest.mark.parametrize("auroc, is_worse", [(0.4999, True), (0.5, False), (0.5001, False)])
def test_worse_than_chance_is_said_only_where_both_are_attacked(render, results, open_set, auroc, is_worse):
    open_set["detectors"]["max_logit"]["grid"]["both_attacked"]["auroc"] = auroc
    section, page = unknown_images(render({**results, "open_set": open_set}))
    marked = {
        detector: "worse than chance" in row_of(section, "AUROC by who is attacked", detector)
        for detector in ("max logit", "mahalanobis", "openmax")
    }
    assert marked == {"max logit": is_worse, "mahalanobis": True, "openmax": False}
    assert page.text.count("worse than chance") == sum(marked.values())
    assert section.count('<span class="status bad">✗ worse than chance</span>') == sum(marked.values())


def test_accuracy_with_reject_that_was_not_sought_is_not_run(render, results, open_set):
    section, page = unknown_images(render({**results, "open_set": open_set}))
    assert row_of(section, "What the attacks leave", "max logit").endswith("not run")
    assert page.text.count("not run") == 1
    open_set["attack"].update(joint_attacks=[], candidates=0)
    assert "Such points were sought" not in unknown_images(render({**results, "open_set": open_set}))[1].text


def test_figures_of_the_inside_are_shown_from_the_results(render, results):
    figures_of = {"loss_rise_0.1": (0.0418, 0.0331, 0.0506), "adversarial_decoded_psnr": (17.91, 17.62, 18.2)}
    results["internals"] = {
        "n": 480,
        "attack": {"steps": 20},
        "seed": 0,
        "directions": 5,
        "figures": {name: {"value": mean, "n": 480, "ci95": ci95} for name, (mean, *ci95) in figures_of.items()},
    }
    check_results(results)
    source = render(results)
    section = Page(re.search(r'<section aria-labelledby="internals".*?</section>', source, re.DOTALL).group())
    assert "adversarial decoded psnr 17.91 17.62 to 18.2" in section.text and "first 480 test images" in section.text
    numbers = NUMBER.findall(section.text.replace("95 % interval", ""))
    assert sorted({each.strip(",.") for each in numbers} - traceable(results)) == []
    assert "Inside the model" not in render({**results, "internals": None}) and section.all("img", "src") == []


def test_picture_of_the_embedding_is_in_the_page_where_the_inside_was_measured(render, results, tmp_path):
    path = tmp_path / "embedding.png"
    assert "<img" not in render(results, pictures={"embedding": path})  # and the file is not read
    Image.new("RGB", (3, 2), "white").save(path)
    results["internals"] = {"n": 8, "attack": {"steps": 20}, "seed": 0, "directions": 5, "figures": {}}
    (source,) = Page(render(results, pictures={"embedding": path})).all("img", "src")
    assert source == f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_mean_over_attacks_is_shown_beside_the_words_that_it_is_no_robustness(render, results):
    names = ("fgsm", "bim", "pgd40", "cw_l2", "deepfool")
    entries = [{"name": name, "accuracy": wilson(3 * place, 13)} for place, name in enumerate(names)]
    entries[3]["median_l2"], entries[4]["median_l2"] = None, 0.517
    mean = {"value": 0.4642, "n": 13, "ci95": [0.3077, 0.6154]}
    results["nonadaptive"] = {"n": 13, "seed": 0, "clean_accuracy": wilson(12, 13), "attacks": entries, "mean": mean}
    results["nonadaptive"]["settings"] = {name: {} for name in names}
    check_results(results)
    source = render(results)
    section = Page(re.search(r'<section aria-labelledby="nonadaptive".*?</section>', source, re.DOTALL).group())
    assert "know nothing of the defense; robust accuracy is the worst case" in section.text
    assert section.text.count("none fooled") == 1 and section.text.endswith("mean over attacks 46.4 % 30.8 to 61.5 %")
    numbers = NUMBER.findall(section.text.replace("95 % interval", ""))
    assert sorted({each.strip(",.") for each in numbers} - traceable(results)) == []
    assert "non-adaptive" not in render({**results, "nonadaptive": None})


def test_attacks_on_the_classifier_alone_are_shown_beside_the_words_that_they_are_no_robustness(render, results):
    entries = [
        {"name": "pgd40", "accuracy": wilson(11, 13), "bare_accuracy": wilson(2, 13)},
        {"name": "cw_l2", "accuracy": wilson(10, 13), "bare_accuracy": wilson(0, 13), "median_l2": 0.213},
    ]
    results["oblivious"] = {"n": 13, "seed": 0, "clean_accuracy": wilson(12, 13), "attacks": entries}
    results["oblivious"] |= {"bare_clean_accuracy": wilson(13, 13), "has_purifier": True}
    results["oblivious"] |= {"left_out": {"ddn": "foolbox is not installed"}, "settings": {}}
    check_results(results)
    source = render(results)
    section = Page(re.search(r'<section aria-labelledby="oblivious".*?</section>', source, re.DOTALL).group())
    assert "does not know of what stands in front; no measure of robustness" in section.text
    assert "Without ddn: foolbox is not installed." in section.text and "Nothing stands" not in section.text
    assert section.text.endswith("cw_l2 0.0 % 76.9 % 49.7 to 91.8 % 0.213")
    numbers = NUMBER.findall(section.text.replace("95 % interval", ""))
    assert sorted({each.strip(",.") for each in numbers} - traceable(results)) == []
    assert "classifier alone" not in render({**results, "oblivious": None})


def test_chosen_examples_are_fooled_first_and_of_all_classes():
    image, image_adv, label, before, after, labels = candidates((4, 4, 1))
    chosen = choose_examples(image, image_adv, label, before, after, labels)
    assert len(chosen.label) == 12
    fooled = (chosen.clean_prediction == chosen.label) & (chosen.adversarial_prediction != chosen.label)
    count = int(((before == label) & (after != label)).sum())
    assert fooled[:count].all() and not fooled[count:].any()
    assert set(chosen.label[:3].tolist()) == {0, 1, 2}
    right = chosen.clean_prediction == chosen.label
    assert right.tolist() == sorted(right.tolist(), reverse=True)


def test_examples_where_none_was_fooled_and_none_was_given(render, results):
    source = render(results, choose_examples(*candidates((32, 32, 3), fooled=False)))
    assert source.count("✓ stood") == 12 and "✗ fooled" not in source
    none = Examples(*(np.zeros([0, *shape], int) for shape in ((4, 4, 1), (4, 4, 1), (), (), ())), labels=())
    assert '<figure class="card">' not in render(results, choose_examples(*none))


@pytest.mark.parametrize("shape, side", [((8, 8, 1), 96), ((32, 32, 3), 96), ((100, 90, 3), 100), ((450, 400, 1), 150)])
def test_pictures_are_whole_pixels_of_the_images(render, results, shape, side):
    drawn = candidates(shape)
    chosen = choose_examples(*(each[:2] for each in drawn[:-1]), drawn[-1])
    sources = Page(render(results, chosen)).all("img", "src")
    before, after, difference = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources[:3]
    )
    assert before.shape == after.shape == difference.shape and before.shape[0] == side
    assert before.ndim == (2 if shape[-1] == 1 else 3)
    if side == 96:
        factor = 96 // shape[0]
        expected = np.rint(chosen.image[0] * 255).repeat(factor, axis=0).repeat(factor, axis=1)
        np.testing.assert_array_equal(before.reshape(expected.shape), expected)
        assert difference.max() == 255 and difference.min() <= 1
