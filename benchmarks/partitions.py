"""Makes a dataset of leads: Parquet files, partitioned by country."""

from __future__ import annotations

from pathlib import Path

import polars as pl

COUNTRIES = ("AT", "CH", "DE", "ES", "FR", "GB", "IT", "US")


def make_dataset(folder: Path, rows: int, questions: int, files: int) -> None:
    """Write leads, partitioned by country; row r asks question r mod `questions`."""
    per_file = -(-rows // files)
    for number in range(files):
        start, end = number * per_file, min(rows, (number + 1) * per_file)
        lead = pl.int_range(start, end, eager=True)
        asked = (lead % questions).cast(pl.String)
        frame = pl.DataFrame(
            {
                "Lead": "L-" + lead.cast(pl.String),
                "First Name": "First" + asked,
                "Last Name": "Last" + asked,
                "Company": "Company " + asked + ", Inc.",
                "Website": "https://www.company" + asked + ".example/about",
                "Phone": "+49 30 " + lead.cast(pl.String).str.zfill(8),
                "Note": "met at a fair, hall " + (lead % 17).cast(pl.String),
            }
        )
        place = folder / f"country={COUNTRIES[number % len(COUNTRIES)]}"
        place.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(place / f"part-{number:05}.parquet", row_group_size=100_000)
