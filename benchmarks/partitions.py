"""Makes a dataset of leads: Parquet files, partitioned by country."""

from __future__ import annotations

from pathlib import Path

import polars as pl

COUNTRIES = ("AT", "CH", "DE", "ES", "FR", "GB", "IT", "US")


def make_dataset(folder: Path, rows: int, requests: int, files: int) -> None:
    """Write leads, partitioned by country; row r makes request number r mod `requests`."""
    per_file = -(-rows // files)
    for number in range(files):
        start, end = number * per_file, min(rows, (number + 1) * per_file)
        lead = pl.int_range(start, end, eager=True)
        request_number = (lead % requests).cast(pl.String)
        frame = pl.DataFrame(
            {
                "Lead": "L-" + lead.cast(pl.String),
                "First Name": "First" + request_number,
                "Last Name": "Last" + request_number,
                "Company": "Company " + request_number + ", Inc.",
                "Website": "https://www.company" + request_number + ".example/about",
                "Phone": "+49 30 " + lead.cast(pl.String).str.zfill(8),
                "Note": "met at a fair, hall " + (lead % 17).cast(pl.String),
            }
        )
        part_folder = folder / f"country={COUNTRIES[number % len(COUNTRIES)]}"
        part_folder.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(part_folder / f"part-{number:05}.parquet", row_group_size=100_000)
