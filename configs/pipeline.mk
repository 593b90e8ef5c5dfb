# The loop of `spin run` for make, with real file dependencies: what is there is not made again.
#
#   make -f configs/pipeline.mk CONFIG=demo RUN=runs/a ITERATION=0
#
# makes iteration ITERATION and those before it, and ends with an error where the run would stop
# (a refused player). SET='train.beta=0.05 seed=1' overrides settings; FLAGS='--shrink' takes the
# reduced form of a recipe; SPIN names the command. The rules are those that `spin run --rules`
# prints; they are kept in RUN, and written anew when they change. RUN has no spaces.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

SPIN ?= spin
CONFIG ?= demo
RUN ?= runs/$(CONFIG)
ITERATION ?= 0
SET ?=
FLAGS ?=

ifneq ($(words $(RUN)),1)
$(error RUN='$(RUN)' must be one name without spaces)
endif

NEXT := $(shell echo $$(( $(ITERATION) + 1 )))
RULES := $(RUN)/.rules-$(ITERATION).mk

# A refusal is found in the decision, so it ends make each time, not only when it is made. Promoting
# again changes nothing, but completes what was cut off between decision and pointer.
.PHONY: iteration FORCE
iteration: $(RUN)/iterations/$(shell printf %03d $(ITERATION))/promote/manifest.json
	@$(SPIN) promote $(RUN) --iteration $(ITERATION) --quiet 2> /dev/null || test $$? = 6
	@$(SPIN) opponent $(RUN) --iteration $(NEXT) > /dev/null

# init refuses a run that was started with other settings.
$(RULES): FORCE
	@$(SPIN) init $(RUN) --config $(CONFIG) $(FLAGS) $(SET)
	@$(SPIN) run $(CONFIG) --run $(RUN) --iterations $(NEXT) --rules $(FLAGS) $(SET) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

include $(RULES)
