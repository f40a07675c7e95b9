# make demo            run data, training, evaluation and report, in nine to twenty minutes on two CPU cores
# make dashboard       show the runs in outputs/
# make train           run one training, here or in a cloud: CONFIG=accelerate_configs/X.yaml SCRIPT=scripts/train_unet.py ARGS="…".
#                      Without ARGS it trains the demo's denoiser in outputs/train, and first makes missing drawings and autoencoder.
#                      In a cloud, no ARGS mean the recipe flowers.
# make turbo           distil a model into a student that draws in two steps: MODEL=outputs/demo/unet (ARGS="…")
# make export          compile a model for pictures on a CPU: MODEL=outputs/demo/unet
# make publish         push a trained model with its card to the Hub: MODEL=outputs/demo/unet REPO=ORG/NAME (ARGS="--license …")
# make space           push a page where everybody can try the model: MODEL=outputs/demo/unet SPACE=ORG/NAME
#                      (MODEL=ORG/MODEL takes one from the Hub; DRY_RUN=1 only stages the page)
# make sagemaker-train run the model card's job on SageMaker, after showing its price and asking (DRY_RUN=1, YES=1, WAIT=1, ARGS="…")
# make hf-train        run the model card's training on Hugging Face Jobs (the same variables)
# make jobs            list this suite's jobs on every cloud: state, cost so far, and the command that fetches each
# make clean-caches    list files that can be made again, ask, and remove them (DRY_RUN=1 only lists)
#
# make test            run the test suite
# make style           run ruff and mypy
# make bench           run the benchmarks (benchmarks/README.md); PEER=PATH/train_text_to_image.py adds diffusers' script
# make screenshots     save the dashboard's pages of the runs in outputs/, wide and narrow, light and dark, to outputs/screenshots
# make lock            pin all packages again after a change of requirements (needs uv)
# make prove-captions  kill captioning at random moments: no caption is lost or made twice
# make prove-resume    kill trainings and resume them, and extend finished ones: they equal undisturbed trainings of that length
# make prove-container build the Dockerfile's steps in a new root folder, train, stop and resume there (SIZE=1: only the image's size)
# make prove-space     start a Space in an environment with only its own requirements, and draw
# make load-dashboard  click through the dashboard in 20 sessions for two minutes: no error, bounded memory (ARGS="--outputs outputs")
# make sagemaker-rehearse  play the SageMaker job on this machine as two hosts, with an interruption (FRESH=1: in a fresh environment)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REQUIREMENTS ?= requirements.txt
LOCK = $(REQUIREMENTS:.txt=.lock)
CONFIG ?= accelerate_configs/cpu.yaml
SCRIPT ?= scripts/train_unet.py

# Python keeps compiled packages. uv installs only sources, so every command would compile them again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test train turbo turbo-named export publish named space space-named dashboard screenshots style bench prove-captions prove-resume \
        prove-container prove-space load-dashboard sagemaker-train sagemaker-rehearse hf-train jobs train-config train-inputs clean-caches lock

demo: $(READY)
	$(BIN)/python scripts/run_recipe.py --config scripts/recipes/demo.yaml --output_dir outputs/demo \
	  $(if $(filter file,$(origin CONFIG)),,--accelerate_config $(CONFIG)) $(ARGS)

# Test files run in the order of tests/conftest.py, the longest first. By default xdist would start with those of most tests.
# On two cores, three workers are quicker than two: many tests wait for other processes.
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The YAML's compute_environment decides where a training runs: as a job of SageMaker or Hugging Face, or here by accelerate.
# DRY_RUN, YES, WAIT, FRESH and SIZE: whether the value means yes. A value that is neither yes nor no ends make.
yes = $(if $(filter 1 y Y yes Yes YES true True TRUE on On ON,$(1)),1,$(if $(filter-out \
        0 n N no No NO false False FALSE off Off OFF,$(1)),$(error write 1 for yes or 0 for no, not $(1))))
SUBMIT = $(if $(call yes,$(DRY_RUN)),--dry_run) $(if $(call yes,$(YES)),--yes) $(if $(call yes,$(WAIT)),--wait) $(if $(INSIDE),--inside $(INSIDE)) $(LAUNCH_ARGS)
# Without ARGS, the demo's training runs, on its drawings and its autoencoder.
DEMO := outputs/demo
TRAINS = $(patsubst train_%,%,$(basename $(notdir $(SCRIPT))))
# What CONFIG's compute_environment says: AMAZON_SAGEMAKER, HF_JOBS, LOCAL_MACHINE, or nothing.
KIND = $(shell sed -nE "s/^compute_environment *: *[\"']?([A-Za-z_]+).*/\1/p" "$(CONFIG)" 2>/dev/null)
AWAY = $(filter AMAZON_SAGEMAKER HF_JOBS,$(KIND))
# CONFIG of sagemaker-train and hf-train: their own YAML, unless the command or the shell names one.
own_config = $(if $(filter file,$(origin CONFIG)),accelerate_configs/$(1).yaml,$(CONFIG))
ifndef ARGS
train: $(if $(AWAY),,train-inputs)
train: ARGS = --config $(if $(AWAY),flowers,demo --dataset $(DEMO)/dataset \
              $(if $(filter unet,$(TRAINS)),--vae $(DEMO)/vae) --output_dir outputs/train/$(TRAINS))
endif
train-inputs: $(READY) train-config
	@[ -f $(DEMO)/dataset/README.md ] || { set -x; $(BIN)/python scripts/make_flowers.py --output_dir $(DEMO)/dataset --size 64; }
	@[ "$(TRAINS)" != unet ] || [ -f $(DEMO)/vae/vae/config.json ] || { set -x; \
	  $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml scripts/train_vae.py --config demo \
	    --dataset $(DEMO)/dataset --output_dir $(DEMO)/vae; }

train-config:
	@[ -f "$(CONFIG)" ] || { echo "error: CONFIG=$(CONFIG) does not exist; take a YAML of accelerate_configs/, or a copy" >&2; exit 2; }
	@case "$(KIND)" in AMAZON_SAGEMAKER|HF_JOBS|LOCAL_MACHINE|"") ;; *) \
	  echo "error: $(CONFIG): compute_environment is $(KIND); write LOCAL_MACHINE, AMAZON_SAGEMAKER or HF_JOBS" >&2; exit 2 ;; esac

train: $(READY) train-config
	@case "$(KIND)" in \
	  AMAZON_SAGEMAKER) set -x; $(BIN)/python scripts/launch_sagemaker.py --config_file $(CONFIG) $(SUBMIT) $(SCRIPT) $(ARGS) ;; \
	  HF_JOBS) set -x; $(BIN)/python scripts/launch_hf_job.py --config_file $(CONFIG) $(SUBMIT) $(SCRIPT) $(ARGS) ;; \
	  *) set -x; $(BIN)/accelerate launch --quiet --config_file $(CONFIG) $(SCRIPT) $(ARGS) $(if $(call yes,$(DRY_RUN)),--dry_run) ;; \
	esac

sagemaker-train: ARGS ?= --config flowers
sagemaker-train: $(READY)
	$(BIN)/python scripts/launch_sagemaker.py --config_file $(call own_config,sagemaker) $(SUBMIT) $(SCRIPT) $(ARGS)

hf-train: ARGS ?= --config flowers
hf-train: $(READY)
	$(BIN)/python scripts/launch_hf_job.py --config_file $(call own_config,hf_jobs) $(SUBMIT) $(SCRIPT) $(ARGS)

jobs: $(READY)
	$(BIN)/python scripts/list_jobs.py $(ARGS)

sagemaker-rehearse: $(READY)
	$(BIN)/python tests/rehearse_sagemaker.py $(if $(call yes,$(FRESH)),--fresh)

# The student lies beside its teacher, where preset turbo finds it, and is compiled for the CPU. As in the demo, a CPU that
# computes in bf16 trains in it.
BF16 = $(shell grep -qE "avx512_bf16|amx_bf16" /proc/cpuinfo 2>/dev/null && echo --mixed_precision bf16)
turbo: turbo-named $(READY)
	$(BIN)/accelerate launch --quiet --config_file $(CONFIG) $(if $(filter %/cpu.yaml,$(CONFIG)),$(BF16)) \
	  scripts/distill_unet.py --model $(MODEL) --output_dir $(dir $(MODEL:/=))turbo $(ARGS)
	$(if $(findstring --output_dir,$(ARGS))$(findstring --dry_run,$(ARGS)),,$(BIN)/python scripts/export_pipeline.py --model $(dir $(MODEL:/=))turbo)

turbo-named:
	@[ -n "$(MODEL)" ] || { echo "name the model: make turbo MODEL=outputs/demo/unet" >&2; exit 2; }

export: $(READY)
	$(BIN)/python scripts/export_pipeline.py $(if $(MODEL),--model $(MODEL))

publish: named $(READY)
	$(if $(call yes,$(DRY_RUN)),$(error make publish has no dry run; leave out DRY_RUN))$(BIN)/python scripts/publish_model.py --model $(MODEL) --hub_model_id $(REPO) $(ARGS)

named:
	@[ -n "$(MODEL)" ] && [ -n "$(REPO)" ] || { \
	  echo "name the model and its repository: make publish MODEL=outputs/demo/unet REPO=ORG/NAME" >&2; exit 2; }

space: space-named $(READY)
	$(BIN)/python scripts/publish_space.py --model $(MODEL) --space $(SPACE) $(if $(call yes,$(DRY_RUN)),--dry_run) $(ARGS)

space-named:
	@[ -n "$(MODEL)" ] && [ -n "$(SPACE)" ] || { \
	  echo "name the model and its Space: make space MODEL=outputs/demo/unet SPACE=ORG/NAME" >&2; exit 2; }

prove-captions: $(READY)
	$(BIN)/python tests/prove_captions.py --kills 20

prove-resume: $(READY)
	$(BIN)/python tests/prove_resume.py --kills 20
	$(BIN)/python tests/prove_resume.py --extend --updates 400

prove-container: $(READY)
	$(BIN)/python tests/prove_container.py $(if $(call yes,$(SIZE)),--size)

prove-space: $(READY)
	$(BIN)/python tests/prove_space.py

load-dashboard: $(READY)
	$(BIN)/python tests/load_dashboard.py --sessions 20 --seconds 120 $(ARGS)

dashboard: $(READY)
	$(BIN)/streamlit run dashboard

screenshots: $(READY)
	$(BIN)/python tests/look.py outputs/screenshots

clean-caches: $(READY)
	$(BIN)/python scripts/clean_caches.py $(if $(call yes,$(DRY_RUN)),--dry_run) $(ARGS)

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/step_limit.py
	$(BIN)/python benchmarks/memory_flat.py
	$(BIN)/python benchmarks/damaged_images.py
	$(BIN)/python benchmarks/dashboard_curves.py
	$(BIN)/python benchmarks/dashboard_start.py
	$(BIN)/python benchmarks/dashboard_runs.py
	$(BIN)/python benchmarks/captioning.py tiny
	$(BIN)/python benchmarks/captioning.py base
	$(BIN)/python benchmarks/step_limit.py 4 card bf16
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/memory.py $(PEER)
	$(if $(PEER),$(BIN)/python benchmarks/train.py $(PEER))

# The environment is marked ready at the end, so an interrupted install is repeated. An environment of another Python is emptied
# first. The lock holds all packages, so none is resolved. uv installs them if it exists, otherwise pip. torch has its own pin, as its CPU and CUDA builds differ: pip takes
# the CPU build if one of its indexes offers one.
$(READY): $(REQUIREMENTS) requirements-train.txt scripts/requirements.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or later is needed; name one: make PYTHON=python3.11")'
	@echo "installing $(LOCK) and torch into $(VENV): 2 to 6 GB on disk; a minute by uv, two to five by pip"
	@version='import sys; print(sys.version_info[:2])'; \
	  if [ -e $(BIN)/python ] && [ "$$($(BIN)/python -c "$$version" 2>&1)" != "$$($(PYTHON) -c "$$version")" ]; then \
	    set -x; $(PYTHON) -m venv --clear $(VENV); else set -x; $(PYTHON) -m venv $(VENV); fi
	@if uv --version >/dev/null 2>&1; then \
	  set -x; uv pip install --python $(BIN)/python --no-deps --requirement $(LOCK); \
	else \
	  set -x; $(BIN)/python -m pip install --disable-pip-version-check --no-deps --requirement $(LOCK); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check $(shell grep -o '^torch==[0-9.]*' requirements-train.txt)
	touch $(READY)

# Run this after a change of a pin; it needs uv. The lock leaves out torch, and packages that only its CUDA builds need.
CUDA := $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
        cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx) cuda-bindings cuda-pathfinder cuda-toolkit triton
COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
          $(addprefix --no-emit-package ,torch $(CUDA))
lock:
	$(COMPILE) requirements.txt --output-file requirements.lock
	$(COMPILE) requirements-train.txt --constraint requirements.lock --output-file requirements-train.lock
	for name in requirements requirements-train; do \
	  printf '%s\n' "# Exact versions of everything that $$name.txt brings, for Python 3.11 and later on every system; \`make lock\` made it." \
	    "# torch and its CUDA packages are left out: CPU and CUDA builds differ. $$name.txt pins torch." | cat - $$name.lock > $$name.part \
	  && mv $$name.part $$name.lock; \
	done
