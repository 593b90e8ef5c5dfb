# The loop of `spin run` for make, with real file dependencies: what is there is not made again.
#
#   make -f configs/pipeline.mk CONFIG=demo RUN=runs/a ITERATION=0
#
# makes iteration ITERATION and those before it, and ends with an error where the run would stop
# (a refused player). SET='train.beta=0.05 seed=1' overrides settings; SPIN names the command.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

SPIN ?= spin
CONFIG ?= demo
RUN ?= runs/$(CONFIG)
ITERATION ?= 0
SET ?=

CHOSEN := --config $(CONFIG)
# The settings that shape the rules, as words NAME=VALUE; $(1) are options, $(2) is a pattern.
settings = $(shell $(SPIN) config show $(CONFIG) $(SET) $(1) | sed -n 's/^\($(2)\): \([^ ]*\)  *\# .*/\1=\2/p')
SETTINGS := $(filter-out %=null,$(call settings,,sft.init\|model.path\|model.revision))
setting = $(patsubst $(1)=%,%,$(filter $(1)=%,$(SETTINGS)))
SFT := $(call setting,sft.init)
MODEL := $(addprefix --model ,$(call setting,model.path)) $(addprefix --revision ,$(call setting,model.revision))
BASE_OPTIONS := $(if $(filter pretrained,$(SFT)),$(MODEL))
FIRST_OPTIONS := $(if $(SFT),--model $(RUN)/models/sft,$(MODEL))

STARTED := $(RUN)/run.json
DATA := $(RUN)/data/manifest.json
FIRST := $(if $(SFT),$(RUN)/models/sft/manifest.json)
START := $(RUN)/start/evaluate/manifest.json
NUMBERS := $(shell seq 0 $(ITERATION))
folder = $(RUN)/iterations/$(shell printf %03d $(1))

# A refusal is found in the decision, so it ends make each time, not only when it is made.
.PHONY: iteration
iteration: $(call folder,$(ITERATION))/promote/manifest.json
	@$(SPIN) opponent $(RUN) --iteration $$(( $(ITERATION) + 1 )) > /dev/null

$(STARTED):
	$(SPIN) init $(RUN) $(CHOSEN) $(SET)

$(DATA): | $(STARTED)
	$(SPIN) prepare --out $(@D) $(CHOSEN) $(SET)

$(RUN)/models/sft/manifest.json: $(DATA)
	$(SPIN) sft --data $(RUN)/data $(BASE_OPTIONS) --out $(@D) $(CHOSEN) $(SET)

$(START): $(DATA) $(FIRST)
	$(SPIN) evaluate $(FIRST_OPTIONS) --data $(RUN)/data --out $(@D) $(CHOSEN) $(SET)

# $(1) the iteration, $(2) its folder, $(3) what must be done before it, $(4) a command that finds
# its opponent, $(5) the options that name it, $(6) its evaluation, $(7) rewards in a ranked game.
define rules
$(2)/generate/manifest.json: $(3)
	$(4)$(SPIN) generate $(5) --data $(RUN)/data --out $$(@D) $(CHOSEN) --iteration $(1) $(SET)

$(2)/reward/manifest.json: $(2)/generate/manifest.json
	$(SPIN) reward --data $(RUN)/data --generations $(2)/generate --out $$(@D) $(CHOSEN) --iteration $(1) $(SET)

$(2)/pair/manifest.json: $(2)/generate/manifest.json $(if $(7),$(7)/manifest.json)
	$(4)$(SPIN) pair --data $(RUN)/data --generations $(2)/generate $(if $(7),--rewards $(7)) $(5) --out $$(@D) $(CHOSEN) --iteration $(1) $(SET)

$(2)/score/manifest.json: $(2)/pair/manifest.json
	$(4)$(SPIN) score --pairs $(2)/pair $(5) --out $$(@D) $(CHOSEN) --iteration $(1) $(SET)

$(2)/train/manifest.json: $(2)/score/manifest.json
	$(4)$(SPIN) train --pairs $(2)/score $(5) --out $$(@D) $(CHOSEN) --iteration $(1) $(SET)

$(2)/evaluate/manifest.json: $(2)/train/manifest.json $(START)
	$(4)$(SPIN) evaluate --model $(2)/train --data $(RUN)/data $(subst --revision,--opponent-revision,$(subst --model,--opponent,$(5))) --opponent-evaluation $(6) --out $$(@D) $(CHOSEN) --iteration $(1) $(SET)

$(2)/promote/manifest.json: $(2)/evaluate/manifest.json
	$(SPIN) promote $(RUN) $(CHOSEN) --iteration $(1) $(SET) || test $$$$? = 6
endef

ask = $$$$($(SPIN) opponent $(RUN) --iteration $(1)$(2))
find = model=$(call ask,$(1)); $()
before = $(call folder,$(shell echo $$(( $(1) - 1 ))))
rewards = $(if $(filter-out %=human_vs_self,$(call settings,--iteration $(1),pair.policy)),$(call folder,$(1))/reward)
first_rules = $(call rules,0,$(call folder,0),$(START),,$(FIRST_OPTIONS),$(RUN)/start/evaluate,$(call rewards,0))
later_rules = $(call rules,$(1),$(call folder,$(1)),$(call before,$(1))/promote/manifest.json,$(call find,$(1)),--model "$$$$model","$(call ask,$(1), --evaluation)",$(call rewards,$(1)))
$(eval $(first_rules))
$(foreach t,$(filter-out 0,$(NUMBERS)),$(eval $(call later_rules,$(t))))
