"""Queries, documents and relevance judgements from a folder, as BEIR lays them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.data.judged import Relevance
from cenote.data.judged_tables import TextPool, Troubles, choose, optional, parts_of, read_table, text_of
from cenote.data.source import PARTS, PartName, part_name
from cenote.data.table import table_format

if TYPE_CHECKING:
    import pandas as pd

DOCUMENT_IDS = ("_id", "doc_id", "docid", "corpus_id", "document_id", "id")
QUERY_IDS = ("_id", "query_id", "qid", "id")
TEXTS = ("text", "contents", "content", "query", "body", "abstract")
GRADES = ("score", "relevance", "grade", "label", "rel")


def relevance_parts(
    folder: Path, pool: TextPool, troubles: Troubles, *, query_prompt: str, document_prompt: str, limit: int | None,
    seed: int,
) -> dict[PartName, Relevance]:  # fmt: skip
    """Read ``corpus.*``, ``queries.*`` and ``qrels.*`` (or ``qrels/SPLIT.*``) into a relevance a split.

    Titles and texts of documents are joined by a space. Judgements of 0 and below say nothing that an absent one does
    not, and a query without a relevant document says nothing about a search; both are dropped. With ``limit``, at most
    so many queries a part are kept, and of the corpus the documents judged for them, filled up to ``limit`` by others
    drawn by ``seed`` (an easier search than the whole one).

    Where queries are documents of the same collection (ArguAna, Quora), a query's own document is not searched for it,
    as in BEIR and MTEB: one with the query's identifier, whose text contains the query, and which is not judged. (BEIR
    goes by the identifier alone; where queries and documents are merely both numbered from 1, that drops at random.)

    Raises:
        ValueError: a table is missing or lacks a column, an identifier comes twice, an unknown split, a grade that is
            no number; and, unless ``troubles`` skips them, empty texts, and judgements of a query or document that is
            not there.
    """
    corpus, queries, judged = _table(folder, "corpus"), _table(folder, "queries"), _judgements(folder)
    documents = _texts(corpus, DOCUMENT_IDS, folder / "corpus", "document")
    asked = _texts(queries, QUERY_IDS, folder / "queries", "query")
    known: dict[str, set[str]] = {}
    for kind, texts in (("query", asked), ("document", documents)):
        known[kind] = set(texts)
        for name in [name for name, text in texts.items() if not text]:
            if kind == "document" or name in set(judged["query"]):
                troubles.report("corpus" if kind == "document" else "queries", f"{kind} {name!r}", "its text is empty")
            del texts[name]
    for kind, texts in (("query", asked), ("document", documents)):
        there = judged[kind].isin(texts.keys())
        for name in judged.loc[~there, kind].unique():
            if name not in known[kind]:  # the empty ones have been reported
                troubles.report("qrels", f"{kind} {name!r}", f"it is judged, but there is no such {kind}")
        judged = judged[there]
    judged = judged[judged["grade"] > 0]

    chosen: dict[PartName, Any] = {}
    for part in PARTS:
        rows = judged[judged["part"] == part]
        if limit is not None and rows["query"].nunique() > limit:
            rows = rows[rows["query"].isin(_draw(rows["query"], limit, seed))]
        if len(rows):
            chosen[part] = rows
    kept = list(documents)
    if limit is not None:
        needed = {name for rows in chosen.values() for name in rows["document"]}
        others = [name for name in documents if name not in needed]
        spare = _draw(others, max(0, limit - len(needed)), seed)
        kept = [name for name in documents if name in needed or name in spare]
    numbers = {
        part: {name: pool.add(query_prompt + asked[name], f"query {name}") for name in rows["query"].unique()}
        for part, rows in chosen.items()
    }
    items = np.array([pool.add(document_prompt + documents[name], f"document {name}") for name in kept], dtype=int)
    position = {name: place for place, name in enumerate(kept)}
    found: dict[PartName, Relevance] = {}
    for part, rows in chosen.items():
        query = rows["query"].map({name: i for i, name in enumerate(numbers[part])}).to_numpy(int)
        document = rows["document"].map(position).to_numpy(int)
        own = {
            (i, position[name])
            for i, name in enumerate(numbers[part])
            if name in position and asked[name] in documents[name]
        }
        excluded = np.array(sorted(own - set(zip(query.tolist(), document.tolist(), strict=True))), dtype=int)
        found[part] = Relevance(
            queries=np.array(list(numbers[part].values()), dtype=int), documents=items, query=query, document=document,
            grade=rows["grade"].to_numpy(float), excluded=excluded.reshape(-1, 2),
        )  # fmt: skip
    return found


def hold_out_queries(whole: Relevance, share: float, seed: int) -> tuple[Relevance, Relevance]:
    """Relevance without and of a share of the queries, drawn by ``seed``."""
    count = len(whole.queries)
    held = np.zeros(count, dtype=bool)
    held[np.random.default_rng(seed).permutation(count)[: min(count - 1, max(1, round(share * count)))]] = True
    return whole.with_queries(~held), whole.with_queries(held)


def _table(folder: Path, name: str) -> pd.DataFrame:
    found = [entry for entry in sorted(folder.glob(f"{name}.*")) if table_format(entry)]
    if not found:
        raise ValueError(f"{folder} has no table {name}.jsonl, .parquet, .csv or .tsv: a retrieval set needs it")
    return read_table(found[0])


def _texts(frame: pd.DataFrame, ids: Sequence[str], where: Path, kind: str) -> dict[str, str]:
    """Text of each identifier; titles in front where there are any."""
    columns = list(frame.columns)
    names = frame[choose(columns, None, ids, f"the {kind}'s identifier", str(where))].map(str)
    twice = names[names.duplicated()]
    if len(twice):
        raise ValueError(f"{where} has {kind} {twice.iloc[0]!r} twice")
    texts = frame[choose(columns, None, TEXTS, f"the {kind}'s text", str(where))].map(text_of)
    title = optional(columns, ("title",)) if kind == "document" else None
    if title is not None:
        texts = (frame[title].map(text_of) + " " + texts).str.strip()
    return dict(zip(names, texts, strict=True))


def _judgements(folder: Path) -> pd.DataFrame:
    """Columns ``query, document`` (text), ``grade`` (number) and ``part``."""
    import pandas as pd

    if (folder / "qrels").is_dir():
        files = [entry for entry in sorted((folder / "qrels").iterdir()) if table_format(entry)]
        if not files:
            raise ValueError(f"{folder / 'qrels'} holds no table: expected test.tsv and the like")
        frame = pd.concat(
            [read_table(f).assign(split=part_name(f.name.split(".")[0], str(folder / "qrels"))) for f in files],
            ignore_index=True,
        )
    else:
        frame = _table(folder, "qrels")
    where, columns = f"{folder / 'qrels'}", list(frame.columns)
    query = choose(columns, None, QUERY_IDS[1:3], "the query's identifier", where)
    document = choose(columns, None, DOCUMENT_IDS[1:5], "the document's identifier", where)
    grade = optional(columns, GRADES)
    part = np.empty(len(frame), dtype=object)
    for name, rows in parts_of(frame, None, where).items():
        part[rows] = name
    grades = pd.to_numeric(frame[grade], errors="coerce") if grade else pd.Series(1.0, index=frame.index)
    wrong = grades.isna().to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"row {row} of {where} has the grade {frame[grade].iloc[row]!r}, which is no number")
    judged = pd.DataFrame({
        "query": frame[query].map(str), "document": frame[document].map(str), "grade": grades.astype(float),
        "part": part,
    }).drop_duplicates()  # fmt: skip
    twice = judged[judged.duplicated(["query", "document", "part"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(
            f"{where} grades document {row['document']!r} for query {row['query']!r} twice and differently"
        )
    return judged


def _draw(names: Iterable[str], count: int, seed: int) -> set[str]:
    """So many different names; the order in which they come does not matter."""
    known = sorted(set(names))
    return {known[i] for i in np.random.default_rng(seed).permutation(len(known))[:count]}
