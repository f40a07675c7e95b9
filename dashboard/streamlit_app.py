"""Show runs in a dashboard: pictures side by side, curves of many runs, and how runs differ.

streamlit run dashboard

Run the dashboard from the repository root. The dashboard shows the run folders below outputs/, and the MLflow store of
MLFLOW_TRACKING_URI (mlflow.db if that is unset). It leaves trained weights and figures as they are: t2i computes everything.

Use this command behind a reverse proxy or a notebook server, with HOST as in the browser's address:
streamlit run dashboard --server.allowedHosts=HOST --server.allowedHosts=localhost --server.corsAllowedOrigins=https://HOST
If the proxy keeps its path in the URL, such as /proxy/absolute/8501, add --server.baseUrlPath=proxy/absolute/8501.
"""

import sys
from pathlib import Path

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

HERE = Path(__file__).resolve().parent
for folder in (str(HERE), str(HERE.parent / "scripts")):
    if folder not in sys.path:
        sys.path.append(folder)  # appended: a script's name must not hide a package's

# name of the file and in the URL: title; the first page opens by default
PAGES = {
    "compare": "Compare",
    "playground": "Playground",
    "blind": "Blind test",
    "curves": "Curves",
    "runs": "Runs",
    "data": "Data",
    "vae": "VAE",
}

RUNS = {"compare": "run", "curves": "runs", "runs": "runs"}  # page: its widget that chooses any number of runs
# Streamlit leaves 6rem above a wide page: a third of a small window, before the first picture. Its captions, the
# chosen segment of a control and the value of a slider have a contrast below 4.5 : 1. A list that always
# has a choice needs no word that one is required.
STYLE = """<style>
[data-testid=stMainBlockContainer] { padding-top: 4rem; padding-bottom: 3rem; }
.stApp [data-testid=stCaptionContainer], .stApp [data-testid=stImageCaption] { opacity: 0.85; }
.stApp [data-testid=stButtonGroup] button[data-selected=true] { color: inherit !important; }
[data-testid=stWidgetLabelRequired] { display: none; }
.stApp [data-testid=stSliderThumbValue], .stApp [data-testid=stSliderThumbValue] p { color: inherit !important; }
</style>"""


def main() -> None:
    # The folder is not named pages: Streamlit would run its files by themselves, without the set-up of this file.
    views = {name: HERE / "views" / f"{name}.py" for name in PAGES}
    names = [name for name, view in views.items() if view.is_file()]  # a Space has the playground alone
    pages = [
        st.Page(views[name], title=PAGES[name], url_path="" if number == 0 else name, default=number == 0)
        for number, name in enumerate(names)
    ]
    page = st.navigation(pages, position="top")
    st.set_page_config(page_title=f"{page.title} · Text-to-image runs", layout="wide")
    st.html(STYLE)
    change_page(page.url_path or next(iter(PAGES)))
    from helpers.loaded_modules import freeze_loaded  # the path to it is set above

    try:
        page.run()
    finally:
        freeze_loaded(f"page {page.url_path}")  # Each page loads libraries of its own.


def change_page(page: str) -> None:
    """Keep the chosen runs when the user opens another page, unless the page's URL names runs (after a link, or Back).

    A change of page drops all other URL parameters.

    Each page has its own URL parameters: `seed`, for example, is a number on one page and a list on another.
    """
    state = st.session_state
    before, state["_page"] = state.get("_page"), page
    context = get_script_run_ctx()
    is_back = context is not None and context.is_history_navigation
    if is_back and not st.query_params:  # back at the page's bare address, which stands for its first choices
        forget_choices()
        st.rerun()
    if before in (None, page) or is_back:  # Back: the URL says all
        return
    forget_choices()
    if page in RUNS and not st.query_params and state.get("_runs"):
        from helpers.run_list import find_runs  # the path to it is set above

        listed = find_runs("unet" if page == "compare" else "any")  # Compare lists no autoencoders
        if runs := [name for name in state["_runs"] if name in listed]:
            state[RUNS[page]] = st.query_params[RUNS[page]] = runs


def forget_choices() -> None:
    """Drop the values of all widgets. The keys of what outlives a change of page begin with an underscore."""
    for key in [key for key in st.session_state if not str(key).startswith("_")]:
        del st.session_state[key]


main()
