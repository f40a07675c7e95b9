"""Runs of this suite: pictures side by side, curves of many runs, and how runs differ.

streamlit run dashboard

Run it from the repository root: it shows the run folders below outputs/, and the MLflow store of MLFLOW_TRACKING_URI
(mlflow.db where that is unset). It reads alone; what is computed is computed by t2i.
"""

import sys
from pathlib import Path

import streamlit as st

HERE = Path(__file__).resolve().parent
for folder in (str(HERE), str(HERE.parent / "scripts")):
    if folder not in sys.path:
        sys.path.append(folder)  # appended: a script's name must not hide a package's

# file, which is also the name in the URL: title
PAGES = {"compare": "Compare", "curves": "Curves", "runs": "Runs"}  # the first is where one arrives

# Streamlit leaves 6rem above a wide page: a third of a small window, before the first picture.
LESS_ROOM = "<style>[data-testid=stMainBlockContainer] { padding-top: 4rem; padding-bottom: 3rem; }</style>"


def main() -> None:
    # Not in a folder named pages: Streamlit would run its files by themselves, before this one says what they need.
    pages = [
        st.Page(HERE / "views" / f"{name}.py", title=title, url_path="" if number == 0 else name, default=number == 0)
        for number, (name, title) in enumerate(PAGES.items())
    ]
    page = st.navigation(pages, position="top")
    st.set_page_config(page_title=f"{page.title} · Text-to-image runs", layout="wide")
    st.html(LESS_ROOM)
    page.run()


main()
