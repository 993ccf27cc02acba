"""Preference pairs from elsewhere: every container, every broken row, and one line for what cannot be read."""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpobench.bench.budget import Budget, Meter, Spent
from gpobench.bench.errors import UserError
from gpobench.bench.images import fitted_pixels, upright_pixels
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt
from gpobench.bench.training import checkpoint, pairs
from gpobench.bench.training.pairs import captions, open_pairs
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser
from gpobench.methods.diffusion_dpo import DiffusionDPO

BOOK = ["a red circle", "a sign"]


def encoded(colour: int, size: tuple[int, int] = (16, 16), form: str = "PNG") -> bytes:
    """A gradient that no other colour has; size is width and height."""
    w, h = size
    x = np.zeros((h, w, 3), np.uint8)
    x[..., 0], x[..., 1], x[..., 2] = colour, np.linspace(0, 255, w)[None], np.linspace(0, 255, h)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(x).save(buffer, form)
    return buffer.getvalue()


def rows(n: int = 6) -> list[dict[str, Any]]:
    """Sound rows; the winner's colour is even, the loser's odd, the sides take turns."""
    found: list[dict[str, Any]] = []
    for k in range(n):
        images, won = [encoded(20 * k), encoded(20 * k + 1)], k % 2
        found.append(
            {
                "caption": f"picture {k // 2}", "jpg_0": images[won], "jpg_1": images[1 - won],
                "label_0": float(not won), "label_1": float(won),
            }
        )  # fmt: skip
    return found


def write(path: Path, what: list[dict[str, Any]], metadata: dict[bytes, bytes] | None = None, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(what).replace_schema_metadata(metadata), path, **options)
    return str(path)


def write_arrow(path: Path, what: list[dict[str, Any]]) -> None:
    """As `datasets.save_to_disk` does: an IPC stream of a few rows a batch."""
    table = pa.Table.from_pylist(what)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (path.parent / "state.json").write_text("{}")


def won(found: pairs.PairSet) -> list[tuple[str, int, int]]:
    """Caption, winner's and loser's colour of every usable row."""
    out: list[tuple[str, int, int]] = []
    for row in range(len(found)):
        two = found.images(row, 16, 16)
        assert not isinstance(two, str)
        out.append((found.captions[found.caption[row]], int(two[0, 0, 0, 0]), int(two[1, 0, 0, 0])))
    return out


WON = [(f"picture {k // 2}", 20 * k, 20 * k + 1) for k in range(6)]


# Containers


def test_every_container_holds_the_same_set(tmp_path: Path) -> None:
    six = rows()
    struct = [{**r, **{s: {"bytes": r[s], "path": f"{s}.jpg"} for s in pairs.SIDES}, "best": 1} for r in six]
    places = [
        write(tmp_path / "one.parquet", six),
        write(tmp_path / "small" / "pairs.parquet", six, row_group_size=4),
        write(tmp_path / "struct" / "pairs.parquet", struct),
    ]
    write(tmp_path / "hub" / "data" / "train-00000-of-00002-abc.parquet", six[:4])
    write(tmp_path / "hub" / "data" / "train-00001-of-00002-def.parquet", six[4:])
    write(tmp_path / "hub" / "data" / "test-00000-of-00001-ghi.parquet", rows(2))  # not to be learnt from
    write_arrow(tmp_path / "disk" / "data-00000-of-00002.arrow", six[:5])
    write_arrow(tmp_path / "disk" / "data-00001-of-00002.arrow", six[5:])
    places += [str(tmp_path / "hub"), str(tmp_path / "disk")]
    found = [open_pairs(place) for place in places]
    for one in found:
        assert won(one) == WON and one.captions == ["picture 0", "picture 1", "picture 2"] and not one.skipped
        assert captions(one.reference) == one.captions
    assert len({one.sha256 for one in found}) == 1
    assert [len(one.chunks) for one in found] == [1, 2, 1, 2, 4]


def test_the_hash_sees_every_part_of_a_row(tmp_path: Path) -> None:
    seen = {open_pairs(write(tmp_path / "a.parquet", rows())).sha256}
    for key, value in (("caption", "else"), ("jpg_0", encoded(77)), ("label_0", 0.5), ("has_label", False)):
        changed = rows()
        changed[3][key] = value
        if key == "has_label":
            changed = [{"has_label": True, **row} for row in changed]
        seen.add(open_pairs(write(tmp_path / "b.parquet", changed)).sha256)
    seen.add(open_pairs(write(tmp_path / "b.parquet", rows()[::-1])).sha256)
    assert len(seen) == 6


def test_whole_numbers_serve_as_labels(tmp_path: Path) -> None:
    whole = [{**r, "label_0": int(r["label_0"]), "label_1": int(r["label_1"])} for r in rows()]
    assert won(open_pairs(write(tmp_path / "a.parquet", whole))) == WON


def test_few_images_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_pairs(write(tmp_path / "a.parquet", rows(), row_group_size=1))
    assert not found._cached  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(pairs, "CACHED", 1)
    assert won(found) == WON and len(found._cached) == 1  # pyright: ignore[reportPrivateUsage]


# Rows that cannot serve

BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("tie", {"label_0": 0.5, "label_1": 0.5}),
    ("tie", {"label_0": 1.0, "label_1": 1.0}),
    ("without label", {"label_0": None}),
    ("without label", {"label_1": math.nan}),
    ("without label", {"label_0": 0.5, "label_1": 1.0}),
    ("without label", {"label_0": 7.0, "label_1": 0.0}),
    ("without label", {"has_label": False}),
    ("without caption", {"caption": None}),
    ("without caption", {"caption": "  "}),
    ("missing image", {"jpg_0": None}),
    ("missing image", {"jpg_1": b""}),
    ("identical images", {"jpg_0": encoded(3), "jpg_1": encoded(3)}),
]


def test_rows_that_cannot_serve_are_counted_by_reason(tmp_path: Path) -> None:
    mixed: list[dict[str, Any]] = [{"has_label": True, **row} for row in rows()]
    for _, change in BROKEN:
        mixed.append({**mixed[0], **change})
    random.Random(0).shuffle(mixed)
    found = open_pairs(write(tmp_path / "a.parquet", mixed))
    assert sorted(won(found)) == WON
    assert found.skipped == Counter(reason for reason, _ in BROKEN)
    for reason, change in BROKEN:
        with pytest.raises(UserError, match=f"no usable pair: 1 {reason}"):
            open_pairs(write(tmp_path / "b.parquet", [{**rows()[0], "has_label": True, **change}], row_group_size=1))


@pytest.mark.parametrize(
    "yes, no", [(True, False), (1, 0), (1.0, 0.0), ("True", "False"), ("1", "0"), (" yes", "no"), ("true", None)]
)
def test_a_row_without_a_label_is_not_learnt_however_it_says_so(tmp_path: Path, yes: Any, no: Any) -> None:
    mixed = [{**row, "has_label": no if k in (1, 4) else yes} for k, row in enumerate(rows())]
    found = open_pairs(write(tmp_path / "a.parquet", mixed))
    assert won(found) == [WON[k] for k in (0, 2, 3, 5)] and found.skipped == {"without label": 2}


@pytest.mark.parametrize("value", [2, "perhaps", 0.5, [True]])
def test_a_label_flag_that_says_neither_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"has_label of a row of .*a\.parquet is .*, which is neither true nor false"):
        open_pairs(write(tmp_path / "a.parquet", [{**row, "has_label": value} for row in rows(2)]))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(2))
    pq.write_table(table.append_column("caption", table.column("caption")), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has several columns called caption"):
        open_pairs(str(tmp_path / "a.parquet"))


def test_captions_that_are_not_utf_8_are_one_line(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(2))
    latin = pa.array([b"caf\xe9", b"plain"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("caption"), "caption", latin), tmp_path / "a.parquet")
    for read in (open_pairs, captions):
        with pytest.raises(UserError, match=r"a\.parquet cannot be read: .*utf-8"):
            read(str(tmp_path / "a.parquet"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    label=st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=4),
    flag=st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=4),
    picture=st.none() | st.binary(max_size=40) | st.just(encoded(7)),
    metadata=st.binary(max_size=20) | st.just(b"[" * 100_000) | JSON.map(lambda value: json.dumps(value).encode()),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_row_is_used_skipped_or_refused(tmp_path: Path, label: Any, flag: Any, picture: Any, metadata: Any) -> None:
    row = {**rows(1)[0], "label_1": label, "has_label": flag, "jpg_1": picture}
    place = write(tmp_path / "a.parquet", [row], {pairs.STATEMENT: metadata})
    try:
        found = open_pairs(place)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert (
            len(found) == 1 and (flag is None or bool(flag)) and isinstance(found.images(0, 16, 16), (str, np.ndarray))
        )


def test_a_struct_that_only_names_a_file_is_a_missing_image(tmp_path: Path) -> None:
    struct = [{**r, **{s: {"bytes": r[s], "path": "x.jpg"} for s in pairs.SIDES}} for r in rows(3)]
    struct[1]["jpg_1"] = {"bytes": None, "path": "elsewhere.jpg"}
    struct[2]["jpg_0"] = None
    found = open_pairs(write(tmp_path / "a.parquet", struct))
    assert len(found) == 1 and found.skipped == {"missing image": 2}


def test_images_that_turn_out_bad_say_so(tmp_path: Path) -> None:
    bad = rows(3)
    bad[0]["jpg_0"] = b"this is no image"
    bad[1]["jpg_1"] = bad[1]["jpg_1"][:60]  # cut off
    bad[2]["jpg_0"], bad[2]["jpg_1"] = encoded(9), encoded(9, form="BMP")  # other bytes, the same pixels
    found = open_pairs(write(tmp_path / "a.parquet", bad))
    assert [found.images(row, 16, 16) for row in range(3)] == ["unreadable image"] * 2 + ["identical images"]


def deep(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(buffer, form)
    return buffer.getvalue()


def test_pictures_are_opened_as_score_opens_them(tmp_path: Path) -> None:
    """Turned by their EXIF orientation, on white, and refused where they are not of 8 bits: never clipped, never on their side."""
    turned, seen_through = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(encoded(40, (16, 32)))).save(turned, "JPEG", exif=exif, quality=100)
    Image.new("RGBA", (32, 16), (0, 0, 0, 0)).save(seen_through, "PNG")
    mixed = rows(3)
    mixed[0]["jpg_0"], mixed[0]["jpg_1"] = turned.getvalue(), seen_through.getvalue()
    mixed[1]["jpg_0"], mixed[2]["jpg_1"] = deep("PNG"), deep("TIFF")
    found = open_pairs(write(tmp_path / "a.parquet", mixed))
    winner, loser = found.images(0, 16, 32)
    np.testing.assert_array_equal(winner, upright_pixels(turned.getvalue()))
    assert (loser == 255).all()
    assert [found.images(row, 16, 16) for row in (1, 2)] == ["image of unsupported pixels"] * 2


# Images


def test_an_image_of_the_right_size_passes_untouched() -> None:
    content = encoded(40)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(fitted_pixels(content, 16, 16), np.asarray(image))


def test_other_sizes_are_cut_around_the_centre() -> None:
    wide = fitted_pixels(
        encoded(40, (64, 16)), 16, 16
    )  # green runs from 0 to 255 over the width: the middle quarter stays
    assert wide.shape == (16, 16, 3) and wide[0, 0, 1] > 80 and wide[0, -1, 1] < 175
    tall = fitted_pixels(encoded(40, (16, 64)), 16, 16)
    assert tall[0, 0, 2] > 80 and tall[-1, 0, 2] < 175
    larger = fitted_pixels(encoded(40, (64, 64)), 8, 16)
    assert larger.shape == (8, 16, 3) and larger[0, 0, 1] < 20 and 50 < larger[0, 0, 2] < 100
    for mode in ("L", "P", "RGBA", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (20, 30)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        assert fitted_pixels(buffer.getvalue(), 16, 16).shape == (16, 16, 3)


# Sets that cannot be read


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "none.parquet").write_bytes(b"")
    (tmp_path / "stream").mkdir()
    (tmp_path / "stream" / "data.arrow").write_bytes(b"nothing")
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    write(tmp_path / "other.parquet", [{"prompt": "a", "chosen": b"x", "rejected": b"y"}])
    write(tmp_path / "text.parquet", [{**rows(1)[0], "jpg_0": "a/path.jpg"}])
    write(tmp_path / "words.parquet", [{**rows(1)[0], "label_0": "better"}])
    write(tmp_path / "numbers.parquet", [{**rows(1)[0], "caption": 3}])
    write(tmp_path / "no_rows.parquet", rows(1))
    pq.write_table(pq.read_table(tmp_path / "no_rows.parquet").slice(0, 0), tmp_path / "no_rows.parquet")
    for name, said in {
        "gone": "no such path: .*gone.*gpobench pairs",
        "empty": "has no data/",
        "text.txt": "is not a .parquet file",
        "broken.parquet": "cannot be read",
        "none.parquet": "cannot be read",
        "stream": "cannot be read",
        "splits": "holds several splits, name one of its folders: train",
        "other.parquet": "no column caption, jpg_0, .*found prompt, chosen, rejected; wanted caption, jpg_0, jpg_1",
        "text.parquet": "column jpg_0 of text.parquet is string, wanted bytes",
        "words.parquet": "column label_0 of words.parquet is string, wanted a number",
        "numbers.parquet": "column caption of numbers.parquet is int64, wanted text",
        "no_rows.parquet": "no usable pair: it has no rows",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            open_pairs(str(tmp_path / name))
        assert "\n" not in str(error.value)
        if "rows" not in said and name != "broken":
            with pytest.raises(UserError):
                captions(str(tmp_path / name))


def test_captions_of_skipped_rows_are_returned_too(tmp_path: Path) -> None:
    mixed = [
        *rows(2),
        {**rows(1)[0], "caption": "a tie", "label_0": 0.5, "label_1": 0.5},
        {**rows(1)[0], "caption": None},
    ]
    assert captions(write(tmp_path / "a.parquet", mixed)) == ["picture 0", "a tie"]


# Through the rig


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Iterator[Any]:
    made: list[MeteredRig] = []

    def build(**bounds: float) -> MeteredRig:
        model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
        meter = Meter(Budget(**bounds or {"nfe": 1e9}))
        made.append(MeteredRig(model, [Prompt(p) for p in BOOK], scorer(f"{redness}:Redness"), meter, seed=1, rows=4))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def latent(rig: MeteredRig, colour: int) -> torch.Tensor:
    image = torch.from_numpy(np.array(fitted_pixels(encoded(colour), 16, 16))).permute(2, 0, 1)[None] / 255
    return rig.model.latents(image)[0]


def test_drawn_pairs_are_latents_with_the_ids_of_their_captions(make: Any, tmp_path: Path) -> None:
    rig, place = make(), write(tmp_path / "a.parquet", rows())
    batch = rig.pairs(place, 6)
    assert batch.win.shape == batch.lose.shape == (6, *rig.model.shape)
    wanted = {
        k: (latent(rig, 20 * k), latent(rig, 20 * k + 1), f"picture {k // 2}") for k in range(6)
    }  # every pair once
    for win, lose, prompt_ids in zip(batch.win, batch.lose, batch.prompt_ids, strict=True):
        k = next(k for k, (w, _, _) in wanted.items() if torch.allclose(w, win, atol=1e-5))
        assert (
            torch.allclose(wanted.pop(k)[1], lose, atol=1e-5)
            and rig.texts(prompt_ids[None])[0].text == f"picture {k // 2}"
        )
    assert not wanted
    v = rig.velocity(batch.win, torch.full((6,), 0.5), batch.prompt_ids)
    assert bool(v.isfinite().all())
    drawn = torch.cat([rig.prompts(2) for _ in range(20)])
    assert set(drawn.tolist()) == {0, 1}  # the captions are never prompts to sample
    more = rig.pairs(place, 14)
    assert len(more.prompt_ids) == 14 and set(Counter(more.prompt_ids.tolist()).values()) <= {4, 5, 6}
    assert sorted(set(more.prompt_ids.tolist())) == [2, 3, 4] and rig.mean("pairs/skipped") == 0 and rig.failures == []


def test_two_sets_do_not_share_ids(make: Any, tmp_path: Path) -> None:
    rig = make()
    other = [{**row, "caption": "of the other set"} for row in rows(2)]
    first, second = write(tmp_path / "a.parquet", rows(2)), write(tmp_path / "b.parquet", other)
    for place, text in ((first, "picture 0"), (second, "of the other set"), (first, "picture 0")):
        assert {p.text for p in rig.texts(rig.pairs(place, 2).prompt_ids)} == {text}


def test_embeddings_of_captions_do_not_pile_up(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set may have more captions than memory holds embeddings."""
    monkeypatch.setenv("GPOBENCH_EMBEDDINGS_MB", "0.01")
    rig = make()
    many = [{**row, "caption": f"caption {i}"} for i, row in enumerate(rows(6))]
    place = write(tmp_path / "a.parquet", many)
    for _ in range(3):
        batch = rig.pairs(place, 2)
        rig.velocity(batch.win, torch.full((2,), 0.5), batch.prompt_ids)
        rig.velocity(batch.win, torch.full((2,), 0.5), torch.tensor([0, 1]))
        assert 0 < rig._embeddings.bytes_in_memory <= 10_000  # pyright: ignore[reportPrivateUsage]


def test_a_bad_image_is_counted_once_and_another_pair_drawn(make: Any, tmp_path: Path) -> None:
    bad = rows(5)
    bad[1]["jpg_0"], bad[3]["jpg_1"] = b"nothing", b"nothing either"
    bad.append({**rows(1)[0], "label_0": 0.5, "label_1": 0.5})
    rig, place = make(), write(tmp_path / "a.parquet", bad)
    for _ in range(4):
        batch = rig.pairs(place, 3)
        assert sorted(batch.prompt_ids.tolist()) == [2, 3, 4]  # the three that can be used, one of each caption
    assert rig.failures == [f"pairs {place}: skipped 3 of 6: 1 tie, 2 unreadable image"]
    rig.notes()
    rig.pairs(place, 1)
    assert rig.mean("pairs/skipped") == 3 and rig.mean("pairs/usable") == 3
    for row in bad:
        row["jpg_1"] = b"nothing"
    with pytest.raises(UserError, match="of its 4 rows no image could be used"):
        rig.pairs(write(tmp_path / "b.parquet", bad), 1)


def statement(**spent: int) -> dict[bytes, bytes]:
    return {pairs.STATEMENT: json.dumps({"spent": spent}).encode()}


def test_what_the_making_cost_is_charged_once(make: Any, tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", rows(), statement(nfe=120, images=30, reward_calls=28))
    rig, folder = make(), tmp_path / "checkpoints"
    method = DiffusionDPO()
    for _ in range(3):
        rig.pairs(place, 2)
    assert dict(rig.meter.roles) == {"data": 120} and (rig.meter.images, rig.meter.reward_calls) == (30, 28)
    checkpoint.save(folder, 1, rig, optimiser(method, rig), {})
    other = make()
    checkpoint.restore(folder, other, optimiser(method, other), print)
    again, there = other.pairs(place, 2), rig.pairs(place, 2)
    assert other.meter.nfe == 120 and other.meter.images == 30
    assert torch.equal(again.win, there.win) and torch.equal(again.prompt_ids, there.prompt_ids)


def test_a_set_that_costs_more_than_the_budget_is_refused_before_the_first_pair(make: Any, tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", rows(), statement(nfe=120, images=30))
    rig = make(nfe=100)
    with pytest.raises(Spent, match="nfe"):
        rig.pairs(place, 2)
    assert rig.meter.nfe == rig.meter.images == 0 and rig.state == {}


@pytest.mark.parametrize("said", [b"not json", b"[1]", b"{}"])
def test_a_set_that_states_no_cost_costs_nothing(make: Any, tmp_path: Path, said: bytes) -> None:
    rig = make()
    rig.pairs(write(tmp_path / "a.parquet", rows(), {pairs.STATEMENT: said}), 2)
    assert rig.meter.nfe == rig.meter.images == 0


@pytest.mark.parametrize(
    "spent", ['{"nfe": -1000}', '{"images": "-5e3"}', '{"nfe": [1, 2]}', '{"reward_calls": null}', '{"nfe": Infinity}',
              '{"nfe": NaN}', '{"nfe": true}', '{"nfe": 1.5}', "[1, 2]", "null", '"much"'],
)  # fmt: skip
def test_a_cost_that_is_none_is_one_line_that_names_the_file(tmp_path: Path, spent: str) -> None:
    place = write(tmp_path / "a.parquet", rows(), {pairs.STATEMENT: f'{{"spent": {spent}}}'.encode()})
    with pytest.raises(UserError, match=r"a\.parquet states spent") as caught:
        pairs.open_pairs(str(place))
    assert "\n" not in str(caught.value)


def test_a_set_that_changed_is_refused_on_resume(make: Any, tmp_path: Path) -> None:
    place, folder, method = write(tmp_path / "a.parquet", rows()), tmp_path / "checkpoints", DiffusionDPO()
    rig = make()
    rig.pairs(place, 2)
    checkpoint.save(folder, 1, rig, optimiser(method, rig), {})
    write(tmp_path / "a.parquet", rows(5))
    other = make()
    checkpoint.restore(folder, other, optimiser(method, other), print)
    with pytest.raises(UserError, match="the set changed since this run was begun"):
        other.pairs(place, 2)
