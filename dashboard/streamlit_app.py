"""Runs of this suite side by side: pictures by checkpoint and guidance scale, with curves.

streamlit run dashboard

Run it from the repository root: it shows the run folders below outputs/. Widgets only: what is computed is computed by t2i.
"""

import sys
from pathlib import Path

import streamlit as st

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "scripts"):  # the pages import common.py and t2i
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # appended: a script's name must not hide a package's

PAGES = {  # file: title; the first is where the dashboard opens
    "compare": "Compare",
}


def main() -> None:
    st.set_page_config(page_title="Text-to-image runs", layout="wide")
    pages = [
        st.Page(HERE / "pages" / f"{name}.py", title=title, url_path="" if number == 0 else name, default=number == 0)
        for number, (name, title) in enumerate(PAGES.items())
    ]
    st.navigation(pages, position="top").run()


main()
