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

# file, which is also the name in the URL: title; the first is where one arrives
PAGES = {
    "compare": "Compare",
    "playground": "Playground",
    "curves": "Curves",
    "runs": "Runs",
    "data": "Data",
    "vae": "VAE",
}


def main() -> None:
    from common import settle

    st.set_page_config(page_title="Text-to-image runs", layout="wide")
    # Not in a folder named pages: Streamlit would run its files by themselves, before this one says what they need.
    views = {name: HERE / "views" / f"{name}.py" for name in PAGES}
    there = [name for name, view in views.items() if view.is_file()]  # a Space has the playground alone
    pages = [
        st.Page(views[name], title=PAGES[name], url_path="" if number == 0 else name, default=number == 0)
        for number, name in enumerate(there)
    ]
    page = st.navigation(pages, position="top")
    if st.session_state.get("_page") != page.url_path:
        # a name in the URL is one page's: seed is a number here, a list there
        for key in [key for key in st.session_state if not str(key).startswith("_")]:
            del st.session_state[key]
        st.session_state["_page"] = page.url_path
    try:
        page.run()
    finally:
        settle("pages")


main()
