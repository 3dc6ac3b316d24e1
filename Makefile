# make test is all that continuous integration runs.  What is fetched and made stays in this folder, git-ignored.

PREFIX ?= /usr/local
PYTHON ?= python3
CACHE := .cache
comma := ,
space := $(subst ,, )
PIP_PACKAGES := cffi docker mypy pytest pytest-timeout PyYAML ruff setuptools
# The real daemon to compare with, unpacked beside the project: never installed, never started on the machine itself.
PEER_PACKAGES := busybox-static conmon containerd crun docker-registry docker.io libassuan0 libdevmapper1.02.1 libgpgme11 \
	libseccomp2 libsubid4 libyajl2 podman runc skopeo tini umoci
# It is fetched anew when this list has changed.
PEER_STAMP := .cache/peer/.complete-$(shell echo "$(PEER_PACKAGES)" | md5sum | cut -c 1-8)
# Newer clients and a newer daemon, from a later Debian than the machine's may be; unpacked beside the project too.
NEWER_SUITE := trixie
NEWER_PACKAGES := containerd docker-buildx docker-compose docker.io
NEWER_STAMP := .cache/newer/.complete-$(shell echo "$(NEWER_SUITE) $(NEWER_PACKAGES)" | md5sum | cut -c 1-8)
# Compose 1.29, which Debian has no more, with what it needs, of its time.
COMPOSE_PACKAGES := docker-compose==1.29.2 attrs==23.2.0 certifi charset-normalizer==3.3.2 distro==1.9.0 docker==5.0.3 \
	dockerpty==0.4.1 docopt==0.6.2 idna jsonschema==3.2.0 pyrsistent==0.20.0 python-dotenv==0.21.1 PyYAML \
	requests==2.31.0 six texttable urllib3==1.26.20 websocket-client==0.59.0
COMPOSE_STAMP := .cache/compose/.complete-$(shell echo "$(COMPOSE_PACKAGES)" | md5sum | cut -c 1-8)
# What is built into images, with all that a bootstrapped Debian lacks for it.
SOFTWARE_PACKAGES := gcc libc6-dev nginx-light python3-pip
SOFTWARE_STAMP := .cache/software/.complete-$(shell echo "$(SOFTWARE_PACKAGES)" | md5sum | cut -c 1-8)
# What the tests call, and the package that has it.
TOOLS := cc:gcc dbus-daemon:dbus-daemon dbus-send:dbus-bin debootstrap:debootstrap ip:iproute2 iptables-restore:iptables ldd:libc-bin mkfs.btrfs:btrfs-progs \
	mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs nft:nftables nsenter:util-linux openssl:openssl ps:procps ss:iproute2 \
	unshare:util-linux
VM_TOOLS := qemu-system-x86_64:qemu-system-x86

# "MINOR INTERPRETER" of every usable Python 3.9 or newer in PATH and under pyenv, oldest first.  Each names itself,
# so that a shim is never taken for an interpreter.
LIST_PYTHONS = for directory in $$(echo "$$PATH" | tr : ' ') $$HOME/.pyenv/versions/*/bin; do \
	for python in $$directory/python3 $$directory/python3.[0-9] $$directory/python3.[0-9][0-9]; do \
	    [ ! -x "$$python" ] || "$$python" -c 'import ctypes, ensurepip, os, ssl, sys, sysconfig, zlib; \
	sys.prefix == sys.base_prefix and sys.version_info >= (3, 9) and \
	os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) and \
	print(sys.version_info[1], sys.executable)' 2>/dev/null; \
	done; done | sort -u -n -k 1,1
# What the machine of `make vmtest` has beside Debian's base: a kernel, systemd, AppArmor, and what tests call.
VM_PACKAGES := apparmor btrfs-progs busybox-static ca-certificates conmon dbus debootstrap e2fsprogs gcc git initramfs-tools iproute2 \
	iptables libc6-dev libdevmapper1.02.1 libseccomp2 linux-image-$(shell dpkg --print-architecture) make openssl \
	nftables procps python3 python3-cffi python3-dev python3-docker python3-ply python3-pytest python3-pytest-timeout \
	python3-setuptools python3-venv python3-yaml runc systemd systemd-sysv xfsprogs xz-utils
# The virtual environments of the oldest and of the newest Python.
OLDEST = $$(head -n 1 $(CACHE)/environments)
NEWEST = $$(tail -n 1 $(CACHE)/environments)
PEER_PATH = $(CURDIR)/$(CACHE)/peer/usr/sbin:$(CURDIR)/$(CACHE)/peer/usr/bin:$(CURDIR)/$(CACHE)/peer/bin

.PHONY: native test lint bench conformance torture install clean tools peer environments

# $(call SUITE,ENVIRONMENT,DIRECTORY): the suite on one Python, with what it makes in a directory of its own.
SUITE = echo "== pytest, $$($(1)/bin/python -V)"; \
	    $(1)/bin/python -m pytest -q -p test_dockerd --basetemp=$(2) test_dockerd.py

# On the oldest and the newest Python at the same time: what the first prints is shown when the other has ended.
test: peer $(CACHE)/debian.tar native lint
	@files=$$(mktemp -d); trap 'rm -rf $$files' EXIT; oldest=$(OLDEST); newest=$(NEWEST); \
	[ $$oldest = $$newest ] || { $(call SUITE,$$oldest,$$files/old); } >$$files/log 2>&1 & \
	{ $(call SUITE,$$newest,$$files/new); }; newer=$$?; \
	wait $$!; older=$$?; [ ! -s $$files/log ] || cat $$files/log; \
	[ $$older = 0 ] && [ $$newer = 0 ]

lint: environments
	@$(OLDEST)/bin/ruff check . && $(OLDEST)/bin/mypy

native: environments
	@for environment in $$(cat $(CACHE)/environments); do $$environment/bin/python _native/build.py || exit 1; done

bench: peer environments
	@PATH="$(PEER_PATH):$$PATH" $(NEWEST)/bin/python bench_dockerd.py $(BENCH)

conformance: peer environments
	@[ -d "$(SPECS)" ] || { echo "make conformance SPECS=DIR: a folder with the published vX.Y.yaml" >&2; exit 2; }
	@DOCKERD_SPECS="$(abspath $(SPECS))" $(NEWEST)/bin/python -m pytest -q -p test_dockerd -m conformance test_dockerd.py

torture: peer native $(SOFTWARE_STAMP)
	@$(NEWEST)/bin/python -m pytest -q -p test_dockerd -m torture test_dockerd.py

# The suite in a booted Debian with cgroup v2 alone, systemd and AppArmor; VMTEST="-k NAMES" for a part of it.
vmtest: TOOLS += $(VM_TOOLS)
vmtest: peer $(CACHE)/debian.tar $(CACHE)/vm/root.ext4
	@PATH="$(PEER_PATH):$$PATH" $(NEWEST)/bin/python test_dockerd.py --vmtest $(VMTEST)

# Programs of the machine that the tests call.
tools:
	@missing=; for pair in $(TOOLS); do \
	    command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	[ -n "$$($(LIST_PYTHONS))" ] || missing="$$missing python3-venv python3-dev"; \
	[ -z "$$missing" ] || { apt-get -q update && apt-get -q install -y --no-install-recommends $$missing; }

peer: $(PEER_STAMP) $(NEWER_STAMP) $(COMPOSE_STAMP)

$(PEER_STAMP): | tools
	@rm -rf $(CACHE)/debs $(CACHE)/peer && mkdir -p $(CACHE)/debs $(CACHE)/peer
	@packages="$(PEER_PACKAGES) $$(apt-cache pkgnames docker-cli | grep -x docker-cli)"; cd $(CACHE)/debs; \
	apt-get -qq download $$packages || { apt-get -q update && apt-get -qq download $$packages; }
	@for package in $(CACHE)/debs/*.deb; do dpkg -x $$package $(CACHE)/peer || exit 1; done
	@touch $@

# Sets $1 and $2 to the first of the machine's own Debian sources, and its suite.
DEBIAN_SOURCE = set -- $$(apt-get indextargets --format '$$(REPO_URI) $$(CODENAME)' \
	    'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Component: main' | head -n 1); \
	[ $$\# = 2 ] || { echo "no Debian source is configured in apt" >&2; exit 1; }

$(NEWER_STAMP): | tools
	@rm -rf $(CACHE)/newer && mkdir -p $(CACHE)/newer/apt/lists/partial $(CACHE)/newer/apt/archives/partial
	@$(DEBIAN_SOURCE); cd $(CACHE)/newer/apt; \
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $$1 $(NEWER_SUITE) main" >sources; \
	printf 'Dir::%s "%s";\n' Etc::SourceList $$PWD/sources Etc::SourceParts /dev/null State::lists $$PWD/lists \
	    Cache $$PWD >configuration; export APT_CONFIG=$$PWD/configuration; \
	apt-get -q update && apt-get -qq download $(NEWER_PACKAGES) && cd .. && \
	for package in apt/*.deb; do dpkg -x $$package . || exit 1; done && rm -rf apt
	@touch $@

$(COMPOSE_STAMP): | environments
	@rm -rf $(CACHE)/compose && $(OLDEST)/bin/pip install -qq --no-deps --target $(CACHE)/compose $(COMPOSE_PACKAGES)
	@touch $@

# $(call DEBOOTSTRAP,DIRECTORY,OPTIONS): a Debian as the machine's own; in a mount namespace, so that no mount can
# stay behind.
DEBOOTSTRAP = mkdir -p $(1) && rm -rf $(1); $(DEBIAN_SOURCE); \
	unshare -m debootstrap --variant=minbase $(2) "$$2" $(1) "$$1" >$(1).log 2>&1 \
	    || { tail -n 20 $(1).log >&2; exit 1; }

$(CACHE)/debian.tar: | tools
	@$(call DEBOOTSTRAP,$(CACHE)/debian)
	@tar -C $(CACHE)/debian -cf $@.new --exclude './var/cache/apt/*.bin' \
	    --exclude './var/cache/apt/archives/*.deb' --exclude './var/lib/apt/lists/*' .
	@rm -rf $(CACHE)/debian && mv $@.new $@

$(SOFTWARE_STAMP): | $(CACHE)/debian.tar
	@rm -rf $(CACHE)/software && mkdir -p $(CACHE)/software/partial
	@tar -xOf $(CACHE)/debian.tar ./var/lib/dpkg/status >$(CACHE)/software/status
	@fetch="apt-get -qq -y -o Dir::State::status=$(CURDIR)/$(CACHE)/software/status \
	    -o Dir::Cache::archives=$(CURDIR)/$(CACHE)/software --no-install-recommends --download-only \
	    install $(SOFTWARE_PACKAGES)"; $$fetch || { apt-get -q update && $$fetch; }
	@touch $@

# The machine's disk, and the kernel and the initial file system that qemu starts.
$(CACHE)/vm/root.ext4: | tools
	@$(call DEBOOTSTRAP,$(CACHE)/vm/tree,--include=$(subst $(space),$(comma),$(strip $(VM_PACKAGES))))
	@rm -f $(CACHE)/vm/tree/var/cache/apt/archives/*.deb
	@cp -L $(CACHE)/vm/tree/vmlinuz $(CACHE)/vm/tree/initrd.img $(CACHE)/vm/
	@truncate -s 8G $@.new && mkfs.ext4 -q -d $(CACHE)/vm/tree $@.new
	@rm -rf $(CACHE)/vm/tree && mv $@.new $@

environments: tools
	@mkdir -p $(CACHE); list=$$(mktemp $(CACHE)/environments.XXXXXX); \
	{ $(LIST_PYTHONS); } | sed -n '1p;$$p' | uniq | while read -r minor python; do \
	    environment=.venv-3.$$minor; echo $$environment >>$$list; \
	    [ "$$(cat $$environment/.complete 2>/dev/null)" = "$$python $(PIP_PACKAGES)" ] || { \
	        echo "== $$environment from $$python"; rm -rf $$environment; \
	        "$$python" -m venv $$environment && $$environment/bin/pip install -qq $(PIP_PACKAGES) && \
	        echo "$$python $(PIP_PACKAGES)" >$$environment/.complete; \
	    } || exit 1; \
	done && mv $$list $(CACHE)/environments

# Everything but the file itself is printed by the file.
install:
	install -D dockerd.py $(DESTDIR)$(PREFIX)/sbin/dockerd.py
	@cd $(DESTDIR)$(PREFIX) && for pair in systemd-service:lib/systemd/system/docker.service \
	    systemd-socket:lib/systemd/system/docker.socket man:share/man/man8/dockerd.py.8 \
	    bash:share/bash-completion/completions/dockerd.py zsh:share/zsh/site-functions/_dockerd.py \
	    fish:share/fish/vendor_completions.d/dockerd.py.fish daemon.json:share/doc/dockerd.py/daemon.json \
	    openrc:share/doc/dockerd.py/openrc sysvinit:share/doc/dockerd.py/sysvinit; do \
	    mkdir -p $$(dirname $${pair#*:}) && \
	    $(PYTHON) -B sbin/dockerd.py --print $${pair%%:*} >$${pair#*:} && \
	    sed -i 's,$(DESTDIR)$(PREFIX),$(PREFIX),g' $${pair#*:} && echo "$(DESTDIR)$(PREFIX)/$${pair#*:}" || exit 1; \
	done

clean:
	rm -rf .cache .venv-* .mypy_cache .pytest_cache .ruff_cache __pycache__ build dist *.egg-info
	rm -rf _native/__pycache__ _native/_helper.*
